/* From stored numbers to what kernels read: decoded, laid out in panels, transformed for Winograd's algorithm.
 *
 * The same as schedules/preparation.py in the same order of operations, so that the results are equal to the bit.
 */
#include "runtime.h"

#pragma STDC FP_CONTRACT OFF

#define BLOCK 4096 /* elements that are decoded together */
#define LANES 16
#define MOST_POINTS 512 /* of a transform in three dimensions */

static float wide(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u, bits;
  float value;
  if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    value = (float)fraction * 0x1p-24f; /* exact: the fraction has ten bits */
    return sign ? -value : value;
  }
  memcpy(&value, &bits, 4);
  return value;
}

/* One block of SPARSE: how many elements a row has, how many rows have their zeros in the same places, and how many values
 * stand before each block; a bit for each element of the first of such rows; then the values. */
static void decode_sparse(const unsigned char *stored, uint64_t elements, uint64_t block, uint32_t *to) {
  uint64_t blocks = (elements + BLOCK - 1) / BLOCK, first = block * BLOCK;
  uint64_t end = elements - first < BLOCK ? elements : first + BLOCK;
  uint32_t row, alike, before;
  memcpy(&row, stored, 4);
  memcpy(&alike, stored + 4, 4);
  memcpy(&before, stored + 8 + 4 * block, 4);
  const uint64_t rows = elements / row, masks = (rows + alike - 1) / alike;
  const unsigned char *bits = stored + rounded(8 + 4 * (size_t)blocks);
  const unsigned char *values = bits + rounded((size_t)(masks * row + 7) / 8) + 4 * (uint64_t)before;
  for (uint64_t each = first; each < end; each++) {
    const uint64_t bit = each / row / alike * row + each % row;
    to[each] = 0;
    if (bits[bit / 8] >> (bit % 8) & 1) memcpy(&to[each], values, 4), values += 4;
  }
}

/* One block of DELTAS: for each block its first element and eight times where its bytes begin, plus their number for each
 * element; then what each element adds, the sign in the lowest bit. */
static void decode_deltas(const unsigned char *stored, uint64_t elements, uint64_t block, uint32_t *to) {
  uint64_t blocks = (elements + BLOCK - 1) / BLOCK, first = block * BLOCK;
  uint64_t count = elements - first < BLOCK ? elements - first : BLOCK;
  uint32_t head[2];
  memcpy(head, stored + 8 * block, sizeof head);
  const unsigned char *at = stored + rounded(8 * (size_t)blocks) + (head[1] >> 3);
  const uint32_t width = head[1] & 7u;
  for (uint64_t each = 0; each < count; each++) {
    uint32_t folded = 0;
    for (uint32_t byte = 0; byte < width; byte++) folded |= (uint32_t)*at++ << (8 * byte);
    head[0] += (folded >> 1) ^ (0u - (folded & 1u));
    to[first + each] = head[0];
  }
}

typedef struct {
  const program_weight *weight;
  const unsigned char *stored;
  const float *source;
  float *to;
} job;

static int decode(int task, parallel_env *env, void *closure) {
  const job *given = closure;
  uint64_t elements = given->weight->source / 4, first = (uint64_t)task * BLOCK;
  (void)env;
  if (given->weight->encoding == SPARSE) {
    decode_sparse(given->stored, elements, (uint64_t)task, (uint32_t *)given->to);
    return 0;
  }
  if (given->weight->encoding == DELTAS) {
    decode_deltas(given->stored, elements, (uint64_t)task, (uint32_t *)given->to);
    return 0;
  }
  const uint16_t *halves = (const uint16_t *)given->stored;
  for (uint64_t each = first; each < elements && each < first + BLOCK; each++) given->to[each] = wide(halves[each]);
  return 0;
}

/* Sizes: groups, output channels of a group, depth, taps, lanes of a panel. Source (groups, out, depth, taps); result
 * (panels, taps, depth, lanes), zero beyond the last output channel. A task is one panel. */
static int lay_out_panel(int task, parallel_env *env, void *closure) {
  const job *given = closure;
  const int32_t *sizes = given->weight->sizes;
  const int64_t out = sizes[1], depth = sizes[2], taps = sizes[3], lanes = sizes[4], per_group = (out + lanes - 1) / lanes;
  const int64_t group = task / per_group, first = task % per_group * lanes, row = depth * taps;
  const int64_t count = out - first < lanes ? out - first : lanes;
  const float *source = given->source + (group * out + first) * row;
  float *to = given->to + (int64_t)task * row * lanes;
  (void)env;
  for (int64_t c = 0; c < depth; c++)
    for (int64_t tap = 0; tap < taps; tap++) {
      float *at = to + (tap * depth + c) * lanes;
      for (int64_t lane = 0; lane < count; lane++) at[lane] = source[lane * row + c * taps + tap];
      for (int64_t lane = count; lane < lanes; lane++) at[lane] = 0.0f;
    }
  return 0;
}

/* One axis: `from` (before, taps, behind) to `to` (before, points, behind), LANES filters at once. */
static void transform_axis(double from[][LANES], double to[][LANES], const double *matrix, const int32_t extents[4]) {
  const int32_t before = extents[0], taps = extents[1], points = extents[2], behind = extents[3];
  for (int32_t outer = 0; outer < before; outer++)
    for (int32_t point = 0; point < points; point++)
      for (int32_t inner = 0; inner < behind; inner++) {
        double *sum = to[(outer * points + point) * behind + inner];
        for (int lane = 0; lane < LANES; lane++) sum[lane] = matrix[point * taps] * from[outer * taps * behind + inner][lane];
        for (int32_t tap = 1; tap < taps; tap++) {
          const double *value = from[(outer * taps + tap) * behind + inner], factor = matrix[point * taps + tap];
          for (int lane = 0; lane < LANES; lane++) sum[lane] = sum[lane] + factor * value[lane];
        }
      }
}

/* Sizes: output and input channels, lanes of a panel, taps left as they are, then along each axis its taps, its points
 * and whether it is transformed. Source (out, in, taps); result (points, panels, taps left, in, lanes). A task is one
 * input channel of LANES filters, whatever panels they are in. */
static int transform_filters(int task, parallel_env *env, void *closure) {
  const job *given = closure;
  const int32_t *sizes = given->weight->sizes, *taps = sizes + 4, *points = sizes + 7, *transformed = sizes + 10;
  const int32_t out = sizes[0], in = sizes[1], lanes = sizes[2], left = sizes[3];
  const int32_t panels = (out + lanes - 1) / lanes, filter = task / in * LANES, channel = task % in;
  const int32_t count = panels * lanes - filter < LANES ? panels * lanes - filter : LANES;
  const int32_t kernel = taps[0] * taps[1] * taps[2], all = points[0] * points[1] * points[2], xi = all / left;
  double first[MOST_POINTS][LANES], second[MOST_POINTS][LANES];
  double(*from)[LANES] = first, (*to)[LANES] = second;
  int64_t place[LANES];
  (void)env;
  for (int32_t one = 0; one < count; one++) {
    int64_t panel = (filter + one) / lanes;
    place[one] = (panel * left * in + channel) * lanes + (filter + one) % lanes;
  }
  for (int32_t tap = 0; tap < kernel; tap++)
    for (int32_t each = 0; each < LANES; each++)
      from[tap][each] =
          filter + each < out ? (double)given->source[((int64_t)(filter + each) * in + channel) * kernel + tap] : 0.0;
  const double *matrix = given->weight->transforms;
  int32_t before = 1, behind = kernel;
  for (int axis = 0; axis < 3; axis++) {
    behind /= taps[axis];
    if (transformed[axis]) {
      transform_axis(from, to, matrix, (int32_t[]){before, taps[axis], points[axis], behind});
      matrix += points[axis] * taps[axis];
      double(*other)[LANES] = from;
      from = to, to = other;
    }
    before *= points[axis];
  }
  for (int32_t each = 0; each < all; each++) {
    int64_t at = ((int64_t)(each % xi) * panels * left + each / xi) * in * lanes;
    for (int32_t one = 0; one < count; one++) /* not the zero times a negative number that stands there */
      given->to[at + place[one]] = filter + one < out ? (float)from[each][one] : 0.0f;
  }
  return 0;
}

int prepare_weight(const program_weight *weight, const unsigned char *stored, void *to) {
  job given = {weight, stored, (const float *)stored, to};
  float *decoded = NULL;
  const int32_t *sizes = weight->sizes;
  if (weight->encoding != PLAIN) {
    if (weight->preparation != AS_STORED && !(decoded = aligned((size_t)weight->source))) return 0;
    job decoding = {weight, stored, NULL, decoded ? decoded : to};
    run_loop(decode, &decoding, (int)((weight->source / 4 + BLOCK - 1) / BLOCK));
    given.source = decoding.to;
  }
  if (weight->preparation == PANELS)
    run_loop(lay_out_panel, &given, sizes[0] * ((sizes[1] + sizes[4] - 1) / sizes[4]));
  else if (weight->preparation == WINOGRAD_PANELS)
    run_loop(transform_filters, &given, ((sizes[0] + sizes[2] - 1) / sizes[2] * sizes[2] + LANES - 1) / LANES * sizes[1]);
  else if (weight->encoding == PLAIN)
    memcpy(to, stored, (size_t)weight->bytes);
  free(decoded);
  return 1;
}
