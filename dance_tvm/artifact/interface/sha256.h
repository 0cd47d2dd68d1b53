/* SHA-256: its constants, and the rounds of one block, on numbers or on vectors of them, each lane of which then hashes
 * data of its own. Who includes this says which: `typedef uint32_t sha256_word;`, or a vector's type. */
#ifndef DANCE_SHA256_H
#define DANCE_SHA256_H

#include <stdint.h>
#include <string.h>

static const uint32_t SHA256_ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
static const uint32_t SHA256_FIRST[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

#define SHA256_TURNED(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

/* The first 16 words are the block's, most significant byte first; the others become what follows from them. */
static void sha256_rounds(sha256_word state[8], sha256_word words[64]) {
  sha256_word v[8];
  for (int word = 16; word < 64; word++) {
    sha256_word old = words[word - 15], new = words[word - 2];
    words[word] = words[word - 16] + words[word - 7] + (SHA256_TURNED(old, 7) ^ SHA256_TURNED(old, 18) ^ (old >> 3)) +
                  (SHA256_TURNED(new, 17) ^ SHA256_TURNED(new, 19) ^ (new >> 10));
  }
  memcpy(v, state, sizeof v);
  for (int round = 0; round < 64; round++) {
    sha256_word e = v[4], a = v[0];
    sha256_word first = v[7] + (SHA256_TURNED(e, 6) ^ SHA256_TURNED(e, 11) ^ SHA256_TURNED(e, 25)) +
                        ((e & v[5]) ^ (~e & v[6])) + SHA256_ROUNDS[round] + words[round];
    sha256_word second = (SHA256_TURNED(a, 2) ^ SHA256_TURNED(a, 13) ^ SHA256_TURNED(a, 22)) +
                         ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    v[7] = v[6], v[6] = v[5], v[5] = e, v[4] = v[3] + first;
    v[3] = v[2], v[2] = v[1], v[1] = a, v[0] = first + second;
  }
  for (int word = 0; word < 8; word++) state[word] += v[word];
}

#endif
