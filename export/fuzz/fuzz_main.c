/* The fuzz target on files, without a fuzzer: `fuzz_main FILE...` runs each, `fuzz_main -n 100000 -s 1 FILE...` runs so
 * many mutations of them: bytes set, counted up and down, copied, cut; from a seeded generator, so that a finding can be
 * repeated.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_FILES 4096
#define MOST_SIZE (1 << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t *files[MOST_FILES];
static size_t sizes[MOST_FILES];
static uint64_t state = 1;

/* xorshift64*; Vigna 2016. */
static uint32_t draw(uint32_t below)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return below == 0 ? 0 : (uint32_t)(state * 2685821657736338717u >> 32) % below;
}

static void read_file(const char *path, size_t i)
{
    FILE *file = fopen(path, "rb");

    files[i] = malloc(MOST_SIZE);
    if (file == NULL || files[i] == NULL) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(2);
    }
    sizes[i] = fread(files[i], 1, MOST_SIZE, file);
    (void)fclose(file);
}

static size_t mutate(uint8_t *data, size_t size)
{
    static const uint8_t ends[] = {0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, 16};
    uint32_t count = 1 + draw(4), i;

    for (i = 0; i < count && size > 0; i++) {
        uint32_t near = draw(3) == 0 ? 64 : draw(2) == 0 ? 700 : (uint32_t)size;    /* header and table more often */
        uint32_t at = draw((uint32_t)(near < size ? near : size)), other = draw((uint32_t)size);

        switch (draw(7)) {
        case 0:
            data[at] = (uint8_t)draw(256);
            break;
        case 1:
            data[at] = ends[draw(sizeof ends)];
            break;
        case 2:
            data[at]++;
            break;
        case 3:
            data[at]--;
            break;
        case 4:
            data[at] ^= (uint8_t)(1u << draw(8));
            break;
        case 5:
            memmove(data + at, data + other, size - (at > other ? at : other) < 16 ? 1 : draw(16));
            break;
        default:
            size = draw(16) == 0 ? draw((uint32_t)size) : size;
            break;
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    uint32_t rounds = 0, i;
    size_t count = 0;
    int arg;

    for (arg = 1; arg < argc && count < MOST_FILES; arg++) {
        if (strcmp(argv[arg], "-n") == 0 && arg + 1 < argc) {
            rounds = (uint32_t)strtoul(argv[++arg], NULL, 10);
        } else if (strcmp(argv[arg], "-s") == 0 && arg + 1 < argc) {
            state = strtoull(argv[++arg], NULL, 10) * 2654435761u + 1u;
        } else {
            read_file(argv[arg], count++);
        }
    }
    for (i = 0; i < count; i++) {
        (void)LLVMFuzzerTestOneInput(files[i], sizes[i]);
    }
    for (i = 0; i < rounds && count > 0; i++) {
        uint32_t chosen = draw((uint32_t)count);
        uint8_t *copy = malloc(sizes[chosen] + 1);

        if (copy == NULL) {
            return 2;
        }
        memcpy(copy, files[chosen], sizes[chosen]);
        (void)LLVMFuzzerTestOneInput(copy, mutate(copy, sizes[chosen]));
        free(copy);
    }
    printf("%u files, %u mutations, no finding\n", (unsigned)count, (unsigned)rounds);
    return 0;
}
