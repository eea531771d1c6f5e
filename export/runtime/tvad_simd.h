/* Which instruction set: TVAD_MVE (Helium), TVAD_DSP (SMLAD and its kin), or neither, from what the compiler says of the
 * core.
 *
 * With -DTVAD_DSP_EMULATE=1 the DSP paths are compiled for any machine, their instructions written out in C: that is how
 * the tests compare them on a PC. The instructions are volatile: GCC otherwise moves all loads of a loop to its front and
 * spills them, which costs more than a third of the instructions.
 */
#ifndef TVAD_SIMD_H
#define TVAD_SIMD_H

#include <stdint.h>
#include <string.h>

#ifndef TVAD_DSP_EMULATE
#define TVAD_DSP_EMULATE 0
#endif

#if defined(__ARM_FEATURE_MVE) && !TVAD_DSP_EMULATE
#define TVAD_MVE 1
#else
#define TVAD_MVE 0
#endif

#if defined(__ARM_FEATURE_DSP) && defined(__thumb2__) && !TVAD_DSP_EMULATE
#define TVAD_DSP 1
#else
#define TVAD_DSP TVAD_DSP_EMULATE
#endif

#if TVAD_DSP

/* Four bytes at any address. Cores with DSP read unaligned words. */
static inline uint32_t tvad_load32(const void *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void tvad_store32(void *p, uint32_t x)
{
    memcpy(p, &x, sizeof x);
}

#if TVAD_DSP_EMULATE

static inline int32_t tvad_low16(uint32_t x)
{
    return (int16_t)(uint16_t)(x & 0xFFFFu);
}

static inline int32_t tvad_high16(uint32_t x)
{
    return (int16_t)(uint16_t)(x >> 16);
}

static inline uint32_t tvad_pair(int32_t low, int32_t high)
{
    return (uint32_t)(low & 0xFFFF) | (uint32_t)high << 16;
}

static inline int32_t tvad_smlad(uint32_t a, uint32_t b, int32_t sum)
{
    const uint32_t low = (uint32_t)(tvad_low16(a) * tvad_low16(b)), high = (uint32_t)(tvad_high16(a) * tvad_high16(b));
    return (int32_t)((uint32_t)sum + low + high);
}

static inline int32_t tvad_smlabb(uint32_t a, uint32_t b, int32_t sum)
{
    return (int32_t)((uint32_t)sum + (uint32_t)(tvad_low16(a) * tvad_low16(b)));
}

static inline int32_t tvad_smlatt(uint32_t a, uint32_t b, int32_t sum)
{
    return (int32_t)((uint32_t)sum + (uint32_t)(tvad_high16(a) * tvad_high16(b)));
}

/* Bytes 0 and 2 as two int16; bytes 1 and 3 for the other. */
static inline uint32_t tvad_sxtb16(uint32_t x)
{
    return tvad_pair((int8_t)(uint8_t)(x & 0xFFu), (int8_t)(uint8_t)((x >> 16) & 0xFFu));
}

static inline uint32_t tvad_sxtb16_ror8(uint32_t x)
{
    return tvad_pair((int8_t)(uint8_t)((x >> 8) & 0xFFu), (int8_t)(uint8_t)(x >> 24));
}

/* (low half of a, low half of b) and (high half of a, high half of b), first one low. */
static inline uint32_t tvad_pack_low(uint32_t a, uint32_t b)
{
    return (a & 0xFFFFu) | b << 16;
}

static inline uint32_t tvad_pack_high(uint32_t a, uint32_t b)
{
    return a >> 16 | (b & 0xFFFF0000u);
}

/* (a * b + 2^31) >> 32. */
static inline int32_t tvad_smmulr(int32_t a, int32_t b)
{
    return (int32_t)(((int64_t)a * b + ((int64_t)1 << 31)) >> 32);
}

/* c + ((a * b + 2^31) >> 32). */
static inline int32_t tvad_smmlar(int32_t a, int32_t b, int32_t c)
{
    return (int32_t)((uint32_t)c + (uint32_t)tvad_smmulr(a, b));
}

static inline int32_t tvad_ssat8(int32_t x)
{
    return x < -128 ? -128 : x > 127 ? 127 : x;
}

/* Two words to an address that is a multiple of 4. */
static inline void tvad_store_pair(void *p, uint32_t a, uint32_t b)
{
    tvad_store32(p, a);
    tvad_store32((uint8_t *)p + 4, b);
}

#else

static inline int32_t tvad_smlad(uint32_t a, uint32_t b, int32_t sum)
{
    __asm__ volatile("smlad %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

static inline int32_t tvad_smlabb(uint32_t a, uint32_t b, int32_t sum)
{
    __asm__ volatile("smlabb %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

static inline int32_t tvad_smlatt(uint32_t a, uint32_t b, int32_t sum)
{
    __asm__ volatile("smlatt %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

static inline uint32_t tvad_sxtb16(uint32_t x)
{
    uint32_t y;
    __asm__ volatile("sxtb16 %0, %1" : "=r"(y) : "r"(x));
    return y;
}

static inline uint32_t tvad_sxtb16_ror8(uint32_t x)
{
    uint32_t y;
    __asm__ volatile("sxtb16 %0, %1, ror #8" : "=r"(y) : "r"(x));
    return y;
}

static inline uint32_t tvad_pack_low(uint32_t a, uint32_t b)
{
    uint32_t y;
    __asm__ volatile("pkhbt %0, %1, %2, lsl #16" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

static inline uint32_t tvad_pack_high(uint32_t a, uint32_t b)
{
    uint32_t y;
    __asm__ volatile("pkhtb %0, %2, %1, asr #16" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

static inline int32_t tvad_smmulr(int32_t a, int32_t b)
{
    int32_t y;
    __asm__ volatile("smmulr %0, %1, %2" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

static inline int32_t tvad_smmlar(int32_t a, int32_t b, int32_t c)
{
    int32_t y;
    __asm__ volatile("smmlar %0, %1, %2, %3" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

static inline int32_t tvad_ssat8(int32_t x)
{
    int32_t y;
    __asm__ volatile("ssat %0, #8, %1" : "=r"(y) : "r"(x));
    return y;
}

typedef uint64_t tvad_two_words __attribute__((may_alias));

static inline void tvad_store_pair(void *p, uint32_t a, uint32_t b)
{
    __asm__ volatile("strd %1, %2, %0" : "=m"(*(tvad_two_words *)p) : "r"(a), "r"(b));
}

#endif
#endif
#endif
