/* Multiply-accumulates that a kernel executed, from the lists and masks that it was given; `device/serve.py` counts the
 * same from outside. */
#include "runtime.h"

/* What stands in an int32 list at `row` of its first axis; where that has one row, it is every row's. */
static const int32_t *row_of(const dance_view *list, int64_t row) {
  int64_t width = 1;
  for (int32_t axis = 1; axis < list->rank; axis++) width *= list->shape[axis];
  return (const int32_t *)list->data + (list->shape[0] > 1 ? row * width : 0);
}

/* Planes of a row that an entry of taps computes, by the bits of a list; 1 where none are told apart. */
static int32_t planes_of(const dance_view *listed, int64_t entry) {
  int32_t found = !listed->data;
  for (uint32_t bits = listed->data ? (uint32_t)*row_of(listed, entry) : 0; bits; bits >>= 1) found += bits & 1;
  return found;
}

/* Multiply-accumulates of one row at one tap: live channels, or the columns of each group of filters. */
static int64_t at_tap(const program_work *work, const dance_view *given, int64_t sample, int32_t tap) {
  const dance_view *in = &given[IN_CHANNELS], *out = &given[OUT_CHANNELS], *starts = &given[COLUMN_STARTS];
  if (!starts->data)
    return (int64_t)(in->data ? *row_of(in, sample) : work->depth) * (out->data ? *row_of(out, sample) : work->filters);
  const int32_t *start = row_of(starts, sample) + tap;
  int64_t found = 0;
  for (int64_t group = 0; group < starts->shape[1]; group++, start += starts->shape[2]) {
    const int64_t left = work->filters - group * work->group, filters = left < work->group ? left : work->group;
    if (filters > 0) found += filters * (start[1] - start[0]);
  }
  return found * work->depth;
}

/* Rows of the tiles from `first` to `last`; what fills a tile up repeats its last row, or is -1. */
static int64_t rows_between(const dance_view *listed, int64_t part, int32_t first, int32_t last) {
  const int64_t size = listed->shape[2];
  const int32_t *rows = row_of(listed, part);
  int64_t found = 0;
  for (int64_t at = first * size; at < last * size; at++) found += rows[at] >= 0 && (at % size == 0 || rows[at] != rows[at - 1]);
  return found;
}

/* Of a direct kernel's samples or a Winograd kernel's chunks: segments of some taps over some tiles of rows. */
static int64_t listed(const program_work *work, const dance_view *given) {
  const int tiled = work->kind == TILES;
  const dance_view *counts = &given[COUNTS], *segments = &given[SEGMENTS];
  const int64_t parts = tiled ? *row_of(counts, counts->shape[0] - 1) : counts->shape[0];
  int64_t macs = 0;
  for (int64_t part = 0; part < parts; part++) {
    const int32_t *count = row_of(counts, part), *segment = row_of(segments, part);
    const int32_t *end = segment + segments->shape[2] * (tiled ? count[2] : row_of(&given[BLOCKS], part)[*count]);
    for (; segment < end; segment += segments->shape[2]) {
      const int64_t rows = rows_between(&given[ROWS_OUT], part, segment[2], segment[3]);
      for (int32_t entry = segment[0]; entry < segment[1]; entry++)
        macs += rows * planes_of(&given[TAP_PLANES], entry) *
                at_tap(work, given, tiled ? segment[4] : part, *row_of(&given[TAP_ENTRIES], entry));
    }
  }
  return macs;
}

/* As many of the dense layer's as of its tiles' products were computed; of two integers as near the even one. */
static int64_t share_of_layer(const program_work *work, const dance_view *given) {
  const dance_view *entries = &given[TAP_ENTRIES];
  int32_t taps = 0, planes = 1;
  for (int64_t entry = 0; entry < entries->shape[0]; entry++) {
    const int32_t tap = *row_of(entries, entry), some = planes_of(&given[TAP_PLANES], entry);
    if (tap >= taps) taps = tap + 1;
    if (some > planes) planes = some;
  }
  const double exact = (double)listed(work, given) / ((double)work->dense * taps * planes) * (double)work->macs;
  const int64_t below = (int64_t)exact;
  const double rest = exact - (double)below;
  return below + (rest > 0.5 || (rest == 0.5 && below % 2));
}

static int is_alive(const dance_view *mask, int64_t at) { return !mask->data || ((const float *)mask->data)[at] != 0; }

/* Taps inside the clip of the positions (N, T, H, W) that masks of frames (N, T) and positions (N or 1, T or 1, H, W)
 * leave. */
static int64_t masked(const program_work *work, const dance_view *given) {
  const int32_t *out = work->taps, *along = out + 4, *down = along + out[1], *across = down + out[2];
  const dance_view *frames = &given[OUT_FRAMES], *positions = &given[POSITIONS];
  int64_t pairs = 0;
  for (int64_t frame = 0; frame < (int64_t)out[0] * out[1]; frame++) {
    if (!is_alive(frames, frame)) continue;
    const int64_t clip = frame / out[1], time = frame % out[1];
    int64_t at = 0;
    if (positions->data)
      at = ((positions->shape[0] > 1 ? clip * positions->shape[1] : 0) + (positions->shape[1] > 1 ? time : 0)) * out[2] * out[3];
    for (int32_t y = 0; y < out[2]; y++)
      for (int32_t x = 0; x < out[3]; x++, at++)
        if (is_alive(positions, at)) pairs += (int64_t)along[time] * down[y] * across[x];
  }
  return pairs * work->depth * work->filters;
}

int count_work(machine *on, const program_work *work, int64_t *macs) {
  dance_view given[OPERANDS] = {{0}};
  const int32_t decision = work->operands[DECISION];
  if (decision >= 0) {
    if (show_tensor(on, decision, &given[DECISION])) return -1;
    if (*row_of(&given[DECISION], 0)) work++;
  }
  for (int32_t each = 0; each < DECISION; each++)
    if (work->operands[each] >= 0 && show_tensor(on, work->operands[each], &given[each])) return -1;
  switch (work->kind) {
    case FIXED: *macs += work->macs; break;
    case ROWS: *macs += listed(work, given); break;
    case TILES: *macs += share_of_layer(work, given); break;
    case MASKS: *macs += masked(work, given); break;
  }
  return 0;
}
