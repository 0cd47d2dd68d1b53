/* Instruction sets of the processor that this runs on, by the names that Linux gives them in /proc/cpuinfo. */
#include "runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>

typedef enum { LEAF_1_C, LEAF_7_B, LEAF_7_C, LEAF_7_D, LEAF_7_1_A, REGISTERS } part;
typedef enum { NO_STATE, VECTORS_OF_8 = 0x6, VECTORS_OF_16 = 0xe6 } state; /* that the system keeps, in XCR0 */

static const struct {
  const char *name;
  part part;
  int bit;
  state state;
} known[] = {
    {"avx", LEAF_1_C, 28, VECTORS_OF_8},          {"fma", LEAF_1_C, 12, VECTORS_OF_8},
    {"f16c", LEAF_1_C, 29, VECTORS_OF_8},         {"avx2", LEAF_7_B, 5, VECTORS_OF_8},
    {"bmi2", LEAF_7_B, 8, NO_STATE},              {"avx512f", LEAF_7_B, 16, VECTORS_OF_16},
    {"avx512dq", LEAF_7_B, 17, VECTORS_OF_16},    {"avx512bw", LEAF_7_B, 30, VECTORS_OF_16},
    {"avx512vl", LEAF_7_B, 31, VECTORS_OF_16},    {"avx512_vnni", LEAF_7_C, 11, VECTORS_OF_16},
    {"avx512_bf16", LEAF_7_1_A, 5, VECTORS_OF_16}, {"avx512_fp16", LEAF_7_D, 23, VECTORS_OF_16},
};

static uint32_t kept_state(void) {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return a;
}

int processor_has(const char *instructions) {
  uint32_t found[REGISTERS] = {0}, a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) found[LEAF_1_C] = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    found[LEAF_7_B] = b, found[LEAF_7_C] = c, found[LEAF_7_D] = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found[LEAF_7_1_A] = a;
  }
  const uint32_t kept = kept_state();
  for (size_t each = 0; each < sizeof known / sizeof known[0]; each++)
    if (!strcmp(known[each].name, instructions))
      return (found[known[each].part] >> known[each].bit & 1) && (kept & known[each].state) == known[each].state;
  return 0;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

#define CAPABILITIES 16 /* AT_HWCAP and AT_HWCAP2, the same on every Linux */
#define MORE_CAPABILITIES 26

static const struct {
  const char *name;
  unsigned long word;
  int bit;
} known[] = {
    {"atomics", CAPABILITIES, 8}, {"asimdhp", CAPABILITIES, 10},   {"asimddp", CAPABILITIES, 20},
    {"i8mm", MORE_CAPABILITIES, 13}, {"bf16", MORE_CAPABILITIES, 14},
};

int processor_has(const char *instructions) {
  for (size_t each = 0; each < sizeof known / sizeof known[0]; each++)
    if (!strcmp(known[each].name, instructions)) return getauxval(known[each].word) >> known[each].bit & 1;
  return 0;
}

#else
int processor_has(const char *instructions) {
  (void)instructions;
  return 0;
}
#endif
