/* The bank and the tensors of one image as constants; the bank at a multiple of its align (16 by default, 4096 at most). */
    .section .rodata
    .balign 4096
    .global bank_bin
bank_bin:
    .incbin "bank.tvb"
bank_end:
    .balign 16
    .global taps_bin
taps_bin:
    .incbin "taps.bin"
taps_end:
    .balign 4
    .global bank_size
bank_size:
    .long bank_end - bank_bin
    .global taps_size
taps_size:
    .long taps_end - taps_bin

#if defined(__linux__) && defined(__ELF__)
    .section .note.GNU-stack, "", %progbits
#endif
