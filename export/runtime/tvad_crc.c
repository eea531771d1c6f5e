/* CRC-32 of a bank: bytes in, zlib's crc32 out. A table of 16 words (64 bytes of flash), a nibble at a time.
 * Source: docs/SPEC.md, section CRC-32; the table is the polynomial 0xEDB88320 times every nibble. */
#include "tvad_internal.h"

uint32_t tvad_crc32(uint32_t crc, const uint8_t *data, size_t nbytes)
{
    static const uint32_t table[16] = {
        0x00000000u, 0x1DB71064u, 0x3B6E20C8u, 0x26D930ACu, 0x76DC4190u, 0x6B6B51F4u, 0x4DB26158u, 0x5005713Cu,
        0xEDB88320u, 0xF00F9344u, 0xD6D6A3E8u, 0xCB61B38Cu, 0x9B64C2B0u, 0x86D3D2D4u, 0xA00AE278u, 0xBDBDF21Cu,
    };
    size_t i;

    crc = ~crc;
    for (i = 0; i < nbytes; i++) {
        crc ^= data[i];
        crc = (crc >> 4) ^ table[crc & 15u];
        crc = (crc >> 4) ^ table[crc & 15u];
    }
    return ~crc;
}
