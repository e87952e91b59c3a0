// Free levels of 2 to 4 bits as exact half operands.
//
// Of a group's alphas, one step is found (steps.cu) of which all of them are integers m_q, very nearly,
// that add up to less than 2048. So every level is an integer that a half holds exactly, times the step.
// All levels of a group fit in registers as bytes, from which `prmt` picks those of four inputs at once,
// lower and upper bytes apart. With 4 bits the table holds the levels of which bit 0 is set; the others
// are their negatives.
//
// A code is the bits of all planes, plane 0 highest.

constexpr int LEVEL_BITS = BITS < 4 ? BITS : 3;     // that pick an entry
constexpr int ENTRIES = 1 << LEVEL_BITS;

// The pair `b` of halves (0 to 15) holds these two inputs of a word.
__host__ __device__ constexpr int level_input(int b, int e) {
  return BITS == 2 ? (b >> 1 & 7) + 16 * (b & 1) + 8 * e : (b >> 2) + 16 * (b >> 1 & 1) + 8 * (b & 1) + 4 * e;
}

DEVICE u32 half_pair(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 add_halves(u32 a, u32 b) { u32 d; asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 subtract_halves(u32 a, u32 b) {
  u32 d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// As __byte_perm, for picks whose nibbles are below 8: no mask is needed.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 picks) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(picks));
  return d;
}

// Codes of one row of a slice, from the words of all planes: what is left to do is to pick.
struct LevelCodes {
  static constexpr int WORDS = BITS == 2 ? 2 : 4;
  // 2 bits: even inputs, odd ones. Else a nibble for each of the inputs r, r + 4, ..: the entry, and bit 0 of 4
  // above it.
  u32 w[WORDS];

  DEVICE void make(const u32 (&plane)[BITS]) {
    if (BITS == 2) {
      w[0] = choose_bits(0xAAAAAAAAu, plane[0] << 1, plane[1]);
      w[1] = choose_bits(0xAAAAAAAAu, plane[0], plane[1] >> 1);
      return;
    }
    u32 p[3];
#pragma unroll
    for (int q = 0; q < 3; q++) p[q] = BITS == 4 ? ~(plane[q + BITS - 3] ^ plane[0]) : plane[q];
    const u32 first = BITS == 4 ? plane[0] : 0;
#pragma unroll
    for (int r = 0; r < WORDS; r++) {
      const bool odd = r & 1;
      const u32 entry = odd ? choose_bits(0xAAAAAAAAu, p[1], p[2] >> 1) : choose_bits(0xAAAAAAAAu, p[1] << 1, p[2]);
      u32 above;
      if (BITS == 4) above = odd ? choose_bits(0xAAAAAAAAu, first, p[0] >> 1) : choose_bits(0xAAAAAAAAu, first << 1, p[0]);
      else above = (odd ? p[0] >> 1 : p[0]) & 0x55555555u;
      w[r] = r < 2 ? choose_bits(0xCCCCCCCCu, above << 2, entry) : choose_bits(0xCCCCCCCCu, above, entry >> 2);
    }
  }
};

// Levels of rows g (row 0) and g + 8 (row 1).
struct Levels {
  u32 low[2][2], high[2][2];   // [row][entries 0 to 3, 4 to 7]; 2 bits: low[row] are entries 0 1 and 2 3

  // `m` are the integers of both rows, as pairs of halves.
  DEVICE void make(const u32 (&m)[BITS]) {
    u32 v[4];   // the lower half of the entries
    if (BITS == 2) {
      v[3] = add_halves(m[0], m[1]);
      v[2] = subtract_halves(m[0], m[1]);
      v[1] = v[2] ^ 0x80008000u;
      v[0] = v[3] ^ 0x80008000u;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        low[row][0] = __byte_perm(v[0], v[1], row ? 0x7632 : 0x5410);
        low[row][1] = __byte_perm(v[2], v[3], row ? 0x7632 : 0x5410);
      }
      return;
    }
    constexpr int A = BITS - 3;   // of 4 bits, plane 0 is added to all
    const u32 sum = add_halves(m[A + 1], m[A + 2]), difference = subtract_halves(m[A + 1], m[A + 2]);
    v[0] = add_halves(m[A], sum) ^ 0x80008000u;
    v[1] = add_halves(m[A], difference) ^ 0x80008000u;
    v[2] = subtract_halves(difference, m[A]);
    v[3] = subtract_halves(sum, m[A]);
    u32 w[4];   // entries 7 to 4
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w[i] = v[i] ^ 0x80008000u;
      if (BITS == 4) {
        v[i] = add_halves(v[i], m[0]);
        w[i] = add_halves(w[i], m[0]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const u32 pick = row ? 0x7362 : 0x5140;
      const u32 a = __byte_perm(v[0], v[1], pick), b = __byte_perm(v[2], v[3], pick);
      const u32 c = __byte_perm(w[3], w[2], pick), d = __byte_perm(w[1], w[0], pick);
      low[row][0] = __byte_perm(a, b, 0x5410);
      high[row][0] = __byte_perm(a, b, 0x7632);
      low[row][1] = __byte_perm(c, d, 0x5410);
      high[row][1] = __byte_perm(c, d, 0x7632);
    }
  }

  // All 16 pairs of one row.
  DEVICE void pairs(int row, const LevelCodes& codes, u32 (&pair)[16]) const {
#pragma unroll
    for (int r = 0; r < LevelCodes::WORDS; r++) {
      if (BITS == 2) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          // Code c of each byte becomes the nibbles 2 c and 2 c + 1.
          const u32 picks = ((codes.w[r] >> 2 * k) & 0x03030303u) * 0x22 + 0x10101010u;
          const int b = 2 * (2 * k + r);
          pair[b] = pick_bytes(low[row][0], low[row][1], picks);
          pair[b + 1] = pick_bytes(low[row][0], low[row][1], picks >> 16);
        }
        continue;
      }
      const u32 picks = BITS == 4 ? codes.w[r] & 0x77777777u : codes.w[r];
      const u32 signs = BITS == 4 ? ~codes.w[r] & 0x88888888u : 0;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 pick = h ? picks >> 16 : picks, sign = h ? signs >> 16 : signs & 0xFFFFu;
        const u32 lo = pick_bytes(low[row][0], low[row][1], pick);
        const u32 hi = pick_bytes(high[row][0], high[row][1], pick);
        const int b = 4 * r + 2 * h;
        pair[b] = __byte_perm(lo, hi, 0x5140);
        pair[b + 1] = __byte_perm(lo, hi, 0x7362);
        if (BITS == 4) {   // the signs of bits 3 and 7, then 11 and 15, to the tops of halves
          pair[b] ^= (sign * 0x01001000u) & 0x80008000u;
          pair[b + 1] ^= (sign * 0x00010010u) & 0x80008000u;
        }
      }
    }
  }
  DEVICE void pairs(int row, const u32 (&plane)[BITS], u32 (&pair)[16]) const {   // from the words of all planes
    LevelCodes codes;
    codes.make(plane);
    pairs(row, codes, pair);
  }
};
