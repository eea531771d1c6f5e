/* Committing what was learnt: a bank in one slot and a session in, the next bank in the other slot out.
 *
 * The new file is made section by section and never lies in RAM: first its CRCs are taken, then the same bytes are programmed,
 * then read back, then the header follows. Python's twin is tinyvad/detectors/device_learning.py, byte for byte; the layout
 * is that of docs/SPEC.md. Only header and table are held, in the workspace where the distances were.
 */
#include <string.h>

#include "tvad_learning.h"

/* Offsets in the header and in an entry of the table. */
enum { VERSION_MINOR = 6, FILE_SIZE = 12, SECTION_COUNT = 16, ALIGN = 20, GENERATION = 48, PAYLOAD_CRC32 = 52,
       HEADER_CRC32 = 60 };
enum { E_OFFSET = 8, E_NBYTES = 12, E_DIM = 16, E_CRC32 = 28 };

#define BLANK 0xFFu                 /* erased flash */

static void program_unit(tvad_writer *w, uint32_t offset)
{
    if (w->failed == 0) {
        w->failed = w->store->program(w->store->user, w->slot, offset, w->unit, TVAD_PROGRAM_UNIT);
    }
}

void tvad_emit(tvad_writer *w, const void *data, uint32_t nbytes)
{
    const uint8_t *from = data;
    uint32_t i;

    w->section_crc = tvad_crc32(w->section_crc, from, nbytes);
    w->payload_crc = tvad_crc32(w->payload_crc, from, nbytes);
    for (i = 0; i < nbytes && w->store != NULL; i++) {
        const uint32_t at = (w->offset + i) % TVAD_PROGRAM_UNIT;

        w->unit[at] = from[i];
        if (at == TVAD_PROGRAM_UNIT - 1u) {
            program_unit(w, w->offset + i - at);
        }
    }
    w->offset += nbytes;
}

static void emit_zeros(tvad_writer *w, uint32_t nbytes)
{
    static const uint8_t zero[1] = {0};

    while (nbytes-- > 0) {
        tvad_emit(w, zero, 1);
    }
}

static void put(uint8_t *at, uint32_t word)
{
    memcpy(at, &word, sizeof word);
}

static uint32_t get(const uint8_t *at)
{
    uint32_t word;

    memcpy(&word, at, sizeof word);
    return word;
}

static uint32_t round_up(uint32_t value, uint32_t align)
{
    return (value + align - 1u) & ~(align - 1u);
}

/* The table's entries, but for offset and CRC; returns how many sections there are. */
static uint32_t make_entries(const tvad_writer *w, uint8_t *head)
{
    const uint8_t *base = w->learner->bank->base, *old = base + TVAD_HEADER_BYTES;
    uint8_t *entry = head + TVAD_HEADER_BYTES;
    uint32_t i, kept = 0, count = tvad_section_count(w->learner->bank);

    memcpy(head, base, TVAD_HEADER_BYTES);
    for (i = 0; i < count; i++, old += TVAD_ENTRY_BYTES) {
        if (tvad_next_has(get(old))) {
            const uint32_t before = get(old + E_DIM), now = tvad_next_dim(w, get(old), before);

            memcpy(entry, old, TVAD_ENTRY_BYTES);
            put(entry + E_DIM, now);
            put(entry + E_NBYTES, get(old + E_NBYTES) / before * now);
            entry += TVAD_ENTRY_BYTES;
            kept++;
        }
    }
    return kept;
}

/* All sections in order, with the zeros between and behind them. The entries' offsets are set on the way, and with
 * `with_crc` their CRCs. */
static void emit_sections(tvad_writer *w, uint8_t *head, uint32_t count, int with_crc)
{
    const uint32_t align = get(head + ALIGN);
    uint32_t i;

    for (i = 0; i < count; i++) {
        uint8_t *entry = head + TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * i;

        put(entry + E_OFFSET, w->offset);
        w->section_crc = 0;
        tvad_next_section(w, get(entry));
        if (with_crc) {
            put(entry + E_CRC32, w->section_crc);
        }
        emit_zeros(w, round_up(w->offset, align) - w->offset);
    }
}

/* Header and table of the new bank into `head`, from a first pass over its bytes; returns the file's size. */
static uint32_t make_head(tvad_writer *w, uint8_t *head)
{
    const uint32_t count = make_entries(w, head), table_end = TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * count;

    w->offset = round_up(table_end, get(head + ALIGN));
    w->payload_crc = 0;
    emit_sections(w, head, count, 1);
    head[VERSION_MINOR] = head[VERSION_MINOR + 1] = 0;
    head[SECTION_COUNT] = (uint8_t)count;
    put(head + FILE_SIZE, w->offset);
    put(head + GENERATION, w->learner->bank->generation + 1u);
    put(head + PAYLOAD_CRC32, w->payload_crc);
    put(head + HEADER_CRC32,
        tvad_crc32(tvad_crc32(0, head, HEADER_CRC32), head + TVAD_HEADER_BYTES, table_end - TVAD_HEADER_BYTES));
    return w->offset;
}

/* Bytes of the new file before the zeros of alignment, in 64 bits: the sizes are added up before anything is made. */
static uint64_t file_bytes(const uint8_t *head, uint32_t count)
{
    const uint64_t align = get(head + ALIGN);
    uint64_t end = TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * count;
    uint32_t i;

    for (i = 0; i < count; i++) {
        end = (end + align - 1u) / align * align + get(head + TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * i + E_NBYTES);
    }
    return (end + align - 1u) / align * align;
}

/* Bytes that there are for it: whole units of the slot, and what LRN allows. */
static uint32_t room_for(const tvad_learner *learner, const tvad_store *store)
{
    const uint32_t whole = store->slot_bytes & ~(TVAD_PROGRAM_UNIT - 1u);

    return whole < learner->slot_bytes ? whole : learner->slot_bytes;
}

/* Everything but the header into the slot. */
static void program_body(tvad_writer *w, uint8_t *head)
{
    const uint32_t count = head[SECTION_COUNT], table = TVAD_ENTRY_BYTES * count, align = get(head + ALIGN);
    uint32_t rest;

    w->offset = TVAD_HEADER_BYTES;
    tvad_emit(w, head + TVAD_HEADER_BYTES, table);
    emit_zeros(w, round_up(w->offset, align) - w->offset);
    emit_sections(w, head, count, 0);
    rest = w->offset % TVAD_PROGRAM_UNIT;
    if (rest != 0) {
        memset(w->unit + rest, BLANK, TVAD_PROGRAM_UNIT - rest);
        program_unit(w, w->offset - rest);
    }
}

/* Is what the slot holds what was meant? */
static int reads_back(const tvad_writer *w, const uint8_t *head, uint32_t file_size)
{
    const uint8_t *slot = w->store->slots[w->slot];
    const uint32_t table_end = TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * head[SECTION_COUNT];
    const uint32_t first = round_up(table_end, get(head + ALIGN));

    return memcmp(slot + TVAD_HEADER_BYTES, head + TVAD_HEADER_BYTES, table_end - TVAD_HEADER_BYTES) == 0 &&
           tvad_crc32(0, slot + first, file_size - first) == get(head + PAYLOAD_CRC32);
}

static void program_header(tvad_writer *w, const uint8_t *head)
{
    uint32_t at;

    for (at = 0; at < TVAD_HEADER_BYTES; at += TVAD_PROGRAM_UNIT) {
        memcpy(w->unit, head + at, TVAD_PROGRAM_UNIT);
        program_unit(w, at);
    }
}

tvad_status tvad_learn_commit(tvad_learner *learner, const tvad_store *store)
{
    const tvad_bank *bank = learner->bank;
    uint8_t *head = (uint8_t *)learner->distance;
    tvad_writer w;
    tvad_bank written;
    uint32_t current, file_size;

    if (bank == NULL || learner->images == 0 ||
        tvad_open_newest(store->slots[0], store->slots[1], store->slot_bytes, &written, &current) != TVAD_OK ||
        written.base != bank->base) {
        return TVAD_ERROR_LEARN;    /* only the bank that is current now may have a successor: the other slot is erased */
    }
    memset(&w, 0, sizeof w);
    w.learner = learner;
    w.slot = 1u - current;
    w.is_cut = tvad_next_rows(&w) > learner->most_rows;
    if (learner->old_rows == 0) {
        tvad_learn_mark(learner, learner->added);
    }
    if (bank->generation == UINT32_MAX || tvad_next_images(learner, learner->task) > (uint32_t)INT32_MAX ||
        file_bytes(head, make_entries(&w, head)) > room_for(learner, store)) {
        return TVAD_ERROR_FULL;
    }
    file_size = make_head(&w, head);
    w.store = store;
    if (store->erase(store->user, w.slot) != 0) {
        return TVAD_ERROR_STORE;
    }
    program_body(&w, head);
    if (w.failed != 0 || !reads_back(&w, head, file_size)) {
        return TVAD_ERROR_STORE;
    }
    program_header(&w, head);
    if (w.failed != 0 || tvad_open(store->slots[w.slot], store->slot_bytes, &written) != TVAD_OK ||
        written.header_crc32 != get(head + HEADER_CRC32)) {
        return TVAD_ERROR_STORE;
    }
    learner->bank = NULL;           /* it is not the current one any more */
    return TVAD_OK;
}
