/* Text that grows, and SHA-256. */
#include "server.h"

#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

void add(text *to, const char *format, ...) {
  va_list words;
  for (;;) {
    va_start(words, format);
    int length = vsnprintf(to->data ? to->data + to->used : NULL, to->room - to->used, format, words);
    va_end(words);
    if (length < 0) return;
    if (to->used + (size_t)length < to->room) {
      to->used += (size_t)length;
      return;
    }
    size_t room = 2 * (to->room + (size_t)length + 1);
    char *more = realloc(to->data, room);
    if (!more) return;
    to->data = more, to->room = room;
  }
}

void add_quoted(text *to, const char *what) {
  add(to, "\"");
  for (const unsigned char *each = (const unsigned char *)what; *each; each++) {
    if (*each == '"' || *each == '\\') add(to, "\\%c", *each);
    else if (*each < 0x20 || *each > 0x7e) add(to, "\\u%04x", *each);
    else add(to, "%c", *each);
  }
  add(to, "\"");
}

size_t read_text(const char *path, char *to, size_t room) {
  size_t used = 0;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t got = 0;
  while (file >= 0 && used < room - 1 && (got = read(file, to + used, room - 1 - used)) > 0) used += (size_t)got;
  if (file >= 0) close(file);
  while (used && (to[used - 1] == '\n' || to[used - 1] == ' ')) used--;
  to[used] = 0;
  return used;
}

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

static void compress(uint32_t state[8], const unsigned char *block) {
  uint32_t words[64], v[8];
  for (int word = 0; word < 16; word++) {
    memcpy(&words[word], block + 4 * word, 4);
    words[word] = __builtin_bswap32(words[word]);
  }
  for (int word = 16; word < 64; word++) {
    uint32_t old = words[word - 15], new = words[word - 2];
    words[word] = words[word - 16] + words[word - 7] + (TURNED(old, 7) ^ TURNED(old, 18) ^ (old >> 3)) +
                  (TURNED(new, 17) ^ TURNED(new, 19) ^ (new >> 10));
  }
  memcpy(v, state, sizeof v);
  for (int round = 0; round < 64; round++) {
    uint32_t e = v[4], a = v[0];
    uint32_t first = v[7] + (TURNED(e, 6) ^ TURNED(e, 11) ^ TURNED(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + ROUNDS[round] + words[round];
    uint32_t second = (TURNED(a, 2) ^ TURNED(a, 13) ^ TURNED(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    v[7] = v[6], v[6] = v[5], v[5] = e, v[4] = v[3] + first;
    v[3] = v[2], v[2] = v[1], v[1] = a, v[0] = first + second;
  }
  for (int word = 0; word < 8; word++) state[word] += v[word];
}

void sha256_begin(sha256 *hash) {
  memcpy(hash->state, FIRST, sizeof FIRST);
  hash->bytes = 0;
}

void sha256_add(sha256 *hash, const void *data, size_t bytes) {
  const unsigned char *from = data;
  while (bytes) {
    size_t inside = (size_t)(hash->bytes % 64), part = 64 - inside < bytes ? 64 - inside : bytes;
    if (part == 64) compress(hash->state, from);
    else {
      memcpy(hash->block + inside, from, part);
      if (inside + part == 64) compress(hash->state, hash->block);
    }
    hash->bytes += part, from += part, bytes -= part;
  }
}

void sha256_end(sha256 *hash, unsigned char digest[DIGEST_BYTES]) {
  static const unsigned char PADDING[64] = {0x80};
  uint64_t bits = __builtin_bswap64(hash->bytes * 8);
  sha256_add(hash, PADDING, 1 + (size_t)((119 - hash->bytes % 64) % 64));
  sha256_add(hash, &bits, sizeof bits);
  for (int word = 0; word < 8; word++) {
    uint32_t turned = __builtin_bswap32(hash->state[word]);
    memcpy(digest + 4 * word, &turned, 4);
  }
}

int sha256_file(const char *path, unsigned char digest[DIGEST_BYTES]) {
  static char piece[1 << 16];
  sha256 hash;
  ssize_t got = -1;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  sha256_begin(&hash);
  while ((got = read(file, piece, sizeof piece)) > 0) sha256_add(&hash, piece, (size_t)got);
  close(file);
  sha256_end(&hash, digest);
  return got == 0;
}

void hmac_sha256(const char *key, const unsigned char *data, size_t bytes, unsigned char digest[DIGEST_BYTES]) {
  unsigned char inner[64] = {0}, outer[64];
  size_t length = strlen(key);
  sha256 hash;
  sha256_begin(&hash);
  sha256_add(&hash, key, length);
  if (length > sizeof inner) sha256_end(&hash, inner);
  else memcpy(inner, key, length);
  for (size_t each = 0; each < sizeof inner; each++) outer[each] = inner[each] ^ 0x5c, inner[each] ^= 0x36;
  sha256_begin(&hash);
  sha256_add(&hash, inner, sizeof inner);
  sha256_add(&hash, data, bytes);
  sha256_end(&hash, digest);
  sha256_begin(&hash);
  sha256_add(&hash, outer, sizeof outer);
  sha256_add(&hash, digest, DIGEST_BYTES);
  sha256_end(&hash, digest);
}

void hex_of(const unsigned char digest[DIGEST_BYTES], char to[HEX_BYTES]) {
  for (int each = 0; each < DIGEST_BYTES; each++) snprintf(to + 2 * each, 3, "%02x", digest[each]);
}

int same_digest(const unsigned char *one, const unsigned char *other) {
  int differs = 0;
  for (int each = 0; each < DIGEST_BYTES; each++) differs |= one[each] ^ other[each];
  return !differs;
}

int random_bytes(void *to, size_t bytes) {
  int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  ssize_t got = file < 0 ? -1 : read(file, to, bytes);
  if (file >= 0) close(file);
  return got == (ssize_t)bytes;
}
