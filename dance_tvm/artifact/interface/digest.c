/* SHA-256 of a file's chunks, several at once: each lane of a vector hashes a chunk of its own. */
#include "runtime.h"

#define LANES 8
#define BLOCK 64
#define CHUNK ((uint64_t)1 << 20)

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

static const uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
static const uint32_t FIRST[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

#define TURNED(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

static void compress(lanes state[8], const unsigned char *const at[LANES]) {
  lanes words[64], v[8];
  for (int word = 0; word < 16; word++)
    for (int lane = 0; lane < LANES; lane++) {
      uint32_t value;
      memcpy(&value, at[lane] + 4 * word, 4);
      words[word][lane] = __builtin_bswap32(value);
    }
  for (int word = 16; word < 64; word++) {
    lanes old = words[word - 15], new = words[word - 2];
    words[word] = words[word - 16] + words[word - 7] + (TURNED(old, 7) ^ TURNED(old, 18) ^ (old >> 3)) +
                  (TURNED(new, 17) ^ TURNED(new, 19) ^ (new >> 10));
  }
  memcpy(v, state, sizeof v);
  for (int round = 0; round < 64; round++) {
    lanes e = v[4], a = v[0];
    lanes first = v[7] + (TURNED(e, 6) ^ TURNED(e, 11) ^ TURNED(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + ROUNDS[round] + words[round];
    lanes second = (TURNED(a, 2) ^ TURNED(a, 13) ^ TURNED(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    v[7] = v[6], v[6] = v[5], v[5] = e, v[4] = v[3] + first;
    v[3] = v[2], v[2] = v[1], v[1] = a, v[0] = first + second;
  }
  for (int word = 0; word < 8; word++) state[word] += v[word];
}

/* The digests of LANES pieces of the same size. */
static void digest_lanes(const unsigned char *const pieces[LANES], uint64_t bytes, unsigned char out[LANES][DIGEST_BYTES]) {
  lanes state[8];
  const unsigned char *at[LANES];
  unsigned char ends[LANES][2 * BLOCK];
  uint64_t whole = bytes / BLOCK * BLOCK, rest = bytes - whole, tail = rest + 9 > BLOCK ? 2 * BLOCK : BLOCK;
  for (int word = 0; word < 8; word++) state[word] = FIRST[word] - (lanes){0};
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
