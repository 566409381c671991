# The guests of guests.rs, in AT&T syntax: each label guest_NAME is the entry of one.

    .pushsection .rodata.guests, "a", @progbits
    .balign 16
    .globl guests_start, guests_end
    .set LOAD, 0x100000
    # From LOAD: tables for the identity map of 4 GiB (a PML4, a page of pointers, four page
    # directories), and the stack that grows down to them.
    .set PML4, LOAD + 0x10000
    .set PDPT, LOAD + 0x11000
    .set PD, LOAD + 0x12000
    .set STACK, LOAD + 0x20000
    # A task state segment that is all zero but for where its bitmap of ports stands: all are allowed.
    .set TSS, LOAD + 0x18000
    .set TSS_BITMAP, 104
    .set UART, 0x3f8
    .set POWER, 0x600
    .set VIRTIO, 0xd0000000
    # The used ring of guest_arp, behind the bitmap of ports.
    .set ARP_USED, LOAD + 0x1c000

guests_start:
    .quad 0                             # first parameter
    .quad 0                             # second parameter

    # Sends AL once the transmitter is ready. Changes AH, DX.
    .macro put_body
    mov %al, %ah
    mov $UART + 5, %dx
1:  in %dx, %al
    test $0x20, %al
    jz 1b
    mov %ah, %al
    mov $UART, %dx
    out %al, %dx
    ret
    .endm

    .code32
put:
    put_body

power_off:
    mov $0x34, %al                      # SLP_EN, SLP_TYP 5
    mov $POWER, %dx
    out %al, %dx
1:  jmp 1b

    .globl guest_hello
guest_hello:
    mov $STACK, %esp
    call hello
    jmp power_off
hello:
    mov $(hello_text - guests_start + LOAD), %esi
1:  mov (%esi), %al
    call put
    inc %esi
    cmpb $0, (%esi)
    jne 1b
    ret
hello_text:
    .asciz "hello\n"

    .globl guest_counter
guest_counter:
    mov $STACK, %esp
    xor %ebx, %ebx
1:  mov %bl, %al
    call put
    inc %ebx
    jmp 1b

    .globl guest_zeroer
guest_zeroer:
    mov LOAD, %ecx
    shl $8, %ecx                        # pages
    mov $0x1000000, %edi
1:  movl $0, (%edi)
    add $4096, %edi
    dec %ecx
    jnz 1b
    jmp guest_counter

    .globl guest_flood
guest_flood:
    mov $STACK, %esp
    xor %ebx, %ebx
1:  cmp LOAD, %ebx
    je power_off
    mov $28, %ecx                       # seven digits, the highest first
2:  sub $4, %ecx
    mov %ebx, %eax
    shr %cl, %eax
    and $15, %eax
    mov (hex_digits - guests_start + LOAD)(%eax), %al
    call flood_put
    test %ecx, %ecx
    jnz 2b
    mov $10, %al
    call flood_put
    inc %ebx
    jmp 1b
flood_put:
    cmpl $0, LOAD + 8
    je put
    mov $UART, %dx
    out %al, %dx
    ret
hex_digits:
    .ascii "0123456789abcdef"

    .globl guest_echo
guest_echo:
    mov $STACK, %esp
1:  mov $UART + 5, %dx
    in %dx, %al
    test $1, %al
    jz 1b
    mov $UART, %dx
    in %dx, %al
    cmp $4, %al
    je power_off
    call put
    jmp 1b

    # Prints a dot if EBX, the round, is a multiple of 4096; then counts it.
    .macro round
    test $0xfff, %ebx
    jnz 9f
    mov $'.', %al
    call put
9:  inc %ebx
    .endm

    .globl guest_pio_storm
guest_pio_storm:
    mov $STACK, %esp
    xor %ebx, %ebx
1:  mov $UART + 7, %dx
    mov %bl, %al
    out %al, %dx
    in %dx, %al
    cmp %bl, %al
    je 2f
    mov $'E', %al
    call put
2:  round
    jmp 1b

    .globl guest_mmio_storm
guest_mmio_storm:
    mov $STACK, %esp
    xor %ebx, %ebx
    mov $VIRTIO, %edi
1:  mov (%edi), %eax
    cmp $0x74726976, %eax               # "virt"
    je 2f
    mov $'E', %al
    call put
2:  round
    jmp 1b

    # Sends an ARP request by the virtio-mmio device in slot 1, an interface: 10.9.8.7, at 02:00:00:00:00:2a, asks
    # for 10.9.8.1. Then prints as counter does.
    .globl guest_arp
guest_arp:
    mov $(VIRTIO + 0x1000), %edi
    movl $3, 0x70(%edi)                 # Status: ACKNOWLEDGE, DRIVER
    movl $1, 0x24(%edi)                 # DriverFeaturesSel
    movl $1, 0x20(%edi)                 # DriverFeatures: VERSION_1, and no other
    movl $0xb, 0x70(%edi)               # FEATURES_OK
    movl $1, 0x30(%edi)                 # QueueSel: transmit
    movl $1, 0x38(%edi)                 # QueueSize
    movl $(arp_descriptor - guests_start + LOAD), 0x80(%edi)
    movl $(arp_available - guests_start + LOAD), 0x90(%edi)
    movl $ARP_USED, 0xa0(%edi)
    movl $1, 0x44(%edi)                 # QueueReady
    movl $0xf, 0x70(%edi)               # DRIVER_OK
    movl $1, 0x50(%edi)                 # QueueNotify
1:  cmpw $1, ARP_USED + 2
    jne 1b
    jmp guest_counter
    .balign 16
arp_descriptor:
    .quad arp_frame - guests_start + LOAD
    .long arp_available - arp_frame
    .long 0
arp_frame:
    .skip 12                            # virtio_net_hdr
    .byte 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 0x2a, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1
    .byte 2, 0, 0, 0, 0, 0x2a, 10, 9, 8, 7, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1
arp_available:
    .word 0, 1, 0

    .globl guest_button
guest_button:
    mov $POWER + 3, %dx
1:  in %dx, %al
    test $1, %al
    jnz power_off
    jmp 1b

    .globl guest_spin
guest_spin:
    jmp guest_spin

    .globl guest_triple_fault
guest_triple_fault:
    lidt no_idt - guests_start + LOAD
    ud2
no_idt:
    .word 0
    .quad 0

    .globl guest_reset_after_hello, guest_reset
guest_reset_after_hello:
    mov $STACK, %esp
    call hello
guest_reset:
    mov $POWER + 2, %dx
    mov $1, %al
    out %al, %dx
1:  jmp 1b

    .globl guest_dirtier
guest_dirtier:
    mov $STACK, %esp
    # The identity map, open to level 3.
    movl $(PDPT + 7), PML4
    mov $(PD + 7), %eax
    mov $PDPT, %edi
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    dec %ecx
    jnz 1b
    mov $0xe7, %eax                     # present, writable, user, accessed, dirty, 2 MiB
    mov $PD, %edi
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    dec %ecx
    jnz 1b
    # Long mode.
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $PML4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx               # EFER
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    lgdt gdt_pointer - guests_start + LOAD
    ljmp $8, $(2f - guests_start + LOAD)
    .code64
2:  mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    # Leave to use ports at level 3, twice: by the bitmap, since a software-only KVM shows IOPL to
    # the emulator as 0; and below by IOPL.
    movw $TSS_BITMAP, TSS + 102
    mov $0x38, %eax
    ltr %ax
    # Level 3 by sysexit: the emulator lacks the other ways.
    mov $0x174, %ecx                    # IA32_SYSENTER_CS; CS and SS of level 3 stand 32 and 40 beyond
    mov $8, %eax
    xor %edx, %edx
    wrmsr
    push $0x3002
    popfq
    mov $STACK, %rcx
    lea dirtier_user(%rip), %rdx
    sysexitq

dirtier_user:
    mov LOAD, %r8                       # pages
    shl $8, %r8
    mov LOAD + 8, %r9                   # delay
    xor %r10, %r10                      # pass
1:  mov $0x1000000, %edi
    xor %r11, %r11                      # page
2:  mov %r10, %rax
    shl $32, %rax
    or %r11, %rax
    test %r10, %r10
    jz 3f
    mov %rax, %rbx
    mov $0x100000000, %rcx
    sub %rcx, %rbx
    cmp %rbx, (%rdi)
    jne 8f
    cmp %rbx, 4088(%rdi)
    jne 8f
3:  mov %rax, (%rdi)
    mov %rax, 4088(%rdi)
    mov %r9, %rcx
4:  test %rcx, %rcx
    jz 5f
    pause
    dec %rcx
    jmp 4b
5:  add $4096, %rdi
    inc %r11
    cmp %r8, %r11
    jb 2b
    inc %r10
    mov $'.', %al
    call put64
    jmp 1b
8:  mov $'E', %al
    call put64
9:  pause
    jmp 9b
put64:
    put_body

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08: code, level 0, 64 bits
    .quad 0x00cf93000000ffff            # 0x10: data, level 0
    .quad 0
    .quad 0
    .quad 0x00affb000000ffff            # 0x28: code, level 3, 64 bits
    .quad 0x00cff3000000ffff            # 0x30: data, level 3
    .word 0xfff, TSS & 0xffff           # 0x38: the task state segment
    .byte (TSS >> 16) & 0xff, 0x89, 0, (TSS >> 24) & 0xff
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt - guests_start + LOAD
guests_end:
    .popsection
