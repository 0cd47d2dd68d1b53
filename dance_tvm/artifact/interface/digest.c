/* SHA-256 of a file's chunks, several at once: each lane of a vector hashes a chunk of its own. */
#include "runtime.h"

#define LANES 8
#define BLOCK 64
#define CHUNK ((uint64_t)1 << 17)

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));
typedef lanes sha256_word;

#include "sha256.h"

static void compress(lanes state[8], const unsigned char *const at[LANES]) {
  lanes words[64];
  for (int word = 0; word < 16; word++)
    for (int lane = 0; lane < LANES; lane++) {
      uint32_t value;
      memcpy(&value, at[lane] + 4 * word, 4);
      words[word][lane] = __builtin_bswap32(value);
    }
  sha256_rounds(state, words);
}

/* The digests of LANES pieces of the same size. */
static void digest_lanes(const unsigned char *const pieces[LANES], uint64_t bytes, unsigned char out[LANES][DIGEST_BYTES]) {
  lanes state[8];
  const unsigned char *at[LANES];
  unsigned char ends[LANES][2 * BLOCK];
  uint64_t whole = bytes / BLOCK * BLOCK, rest = bytes - whole, tail = rest + 9 > BLOCK ? 2 * BLOCK : BLOCK;
  for (int word = 0; word < 8; word++) state[word] = SHA256_FIRST[word] - (lanes){0};
  for (uint64_t done = 0; done < whole; done += BLOCK) {
    for (int lane = 0; lane < LANES; lane++) at[lane] = pieces[lane] + done;
    compress(state, at);
  }
  memset(ends, 0, sizeof ends);
  for (int lane = 0; lane < LANES; lane++) {
    if (rest) memcpy(ends[lane], pieces[lane] + whole, rest);
    ends[lane][rest] = 0x80;
    for (int byte = 0; byte < 8; byte++) ends[lane][tail - 1 - (uint64_t)byte] = (unsigned char)(bytes * 8 >> (8 * byte));
  }
  for (uint64_t done = 0; done < tail; done += BLOCK) {
    for (int lane = 0; lane < LANES; lane++) at[lane] = ends[lane] + done;
    compress(state, at);
  }
  for (int lane = 0; lane < LANES; lane++)
    for (int byte = 0; byte < DIGEST_BYTES; byte++)
      out[lane][byte] = (unsigned char)(state[byte / 4][lane] >> (24 - 8 * (byte % 4)));
}

typedef struct {
  const unsigned char *data;
  uint64_t bytes;
  unsigned char (*digests)[DIGEST_BYTES];
} hashed;

/* LANES chunks; the last chunk of all, where it is shorter, is hashed by itself. */
static int digest_chunks(int task, parallel_env *env, void *closure) {
  const hashed *given = closure;
  uint64_t first = (uint64_t)task * LANES, full = given->bytes / CHUNK;
  const unsigned char *pieces[LANES];
  unsigned char found[LANES][DIGEST_BYTES];
  (void)env;
  uint64_t count = first < full ? (full - first < LANES ? full - first : LANES) : 0;
  for (uint64_t lane = 0; lane < LANES; lane++) pieces[lane] = given->data + (first + (lane < count ? lane : 0)) * CHUNK;
  if (count) {
    digest_lanes(pieces, CHUNK, found);
    memcpy(given->digests[first], found, count * DIGEST_BYTES);
  }
  if (full < first + LANES && full >= first && given->bytes % CHUNK) {
    for (int lane = 0; lane < LANES; lane++) pieces[lane] = given->data + full * CHUNK;
    digest_lanes(pieces, given->bytes % CHUNK, found);
    memcpy(given->digests[full], found, DIGEST_BYTES);
  }
  return 0;
}

int tree_digest(const unsigned char *data, uint64_t bytes, unsigned char digest[DIGEST_BYTES]) {
  uint64_t chunks = (bytes + CHUNK - 1) / CHUNK;
  hashed given = {data, bytes, malloc((size_t)(chunks + 1) * DIGEST_BYTES)};
  const unsigned char *pieces[LANES];
  unsigned char found[LANES][DIGEST_BYTES];
  if (!given.digests) return 0;
  if (chunks) run_loop(digest_chunks, &given, (int)((chunks + LANES - 1) / LANES));
  for (int lane = 0; lane < LANES; lane++) pieces[lane] = (const unsigned char *)given.digests;
  digest_lanes(pieces, chunks * DIGEST_BYTES, found);
  memcpy(digest, found[0], DIGEST_BYTES);
  free(given.digests);
  return 1;
}
