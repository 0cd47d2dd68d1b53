/* Where the program begins: linked with no system's startup code, it is a shared library with an entry and the name of a
 * loader (LOADER), and begins by Android's libc or by glibc, whichever the loader brought. */
int main(int count, char **words);

typedef struct {
  void (**arrays[8])(void);
} structors;

extern void __libc_init(void *stack, void (*unused)(void), int (*main)(int, char **), const structors *none) __attribute__((weak));
extern int __libc_start_main(int (*main)(int, char **), int count, char **words, void (*first)(void), void (*last)(void),
                             void (*end)(void), void *stack) __attribute__((weak));

__asm__(".section .interp,\"a\"\n.asciz \"" LOADER "\"\n.previous\n");

#if defined(__aarch64__)
__asm__(".text\n.globl _start\n_start:\n  mov x29, #0\n  mov x30, #0\n  mov x0, sp\n  b start_here\n");
#elif defined(__x86_64__)
__asm__(".text\n.globl _start\n_start:\n  xor %ebp, %ebp\n  mov %rsp, %rdi\n  and $-16, %rsp\n  call start_here\n");
#endif

__attribute__((used)) void start_here(long *stack) {
  static const structors none;
  if (__libc_init) __libc_init(stack, 0, main, &none);
  if (__libc_start_main) __libc_start_main(main, (int)stack[0], (char **)(stack + 1), 0, 0, 0, stack);
  __builtin_trap();
}
