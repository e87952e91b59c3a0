// Weight bits as exact half operands, without unpacking.
//
// A few bits under a zero exponent are a subnormal half, an exact small integer times 2^(k - 24) if
// their lowest bit is bit k <= 10 - width. So one mask turns a word into two operands: "pair b" is
// inputs b and b + 16 of a word, in its low and high half. The power 2^k of a pair is divided out of x
// when x is arranged (field_position). With uniform levels the planes are first interleaved, so that a
// pair is a whole code of up to 4 bits; otherwise every plane is an operand of its own.

constexpr bool CODES = UNIFORM && BITS <= 4;
constexpr int OPERANDS = CODES ? 1 : BITS;      // products per weight
constexpr int WIDTH = CODES ? BITS : 1;         // bits in a field
constexpr float ALL = 2.f - 2.f / (1 << BITS);  // of a uniform weight's signs, in alphas: code 0 is -ALL

__host__ __device__ constexpr int field_position(int b) {
  return WIDTH == 1 ? b % 10 : WIDTH == 2 ? (b & ~1) % 10 : WIDTH == 3 ? (b < 14 ? b % 8 : b - 14) : (b & ~3) % 8;
}

// One instruction, whatever is known of the mask: the compiler would make two of nested ones.
DEVICE u32 choose_bits(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// The words of one row from which pairs are cut.
struct Fields {
  static constexpr int WORDS = WIDTH == 1 ? 2 : WIDTH == 2 ? 4 : WIDTH == 3 ? 8 : 8;
  u32 w[WORDS];

  // `plane` are the words of all planes (codes), or of one.
  DEVICE void interleave(const u32* plane) {
    if (WIDTH == 1) {
      w[0] = plane[0];
      w[1] = w[0] >> 10;
    } else if (WIDTH == 2) {
      w[0] = choose_bits(0xAAAAAAAAu, plane[0] << 1, plane[1]);   // inputs 0, 2, 4 ...
      w[1] = choose_bits(0xAAAAAAAAu, plane[0], plane[1] >> 1);   // inputs 1, 3, 5 ...
      w[2] = w[0] >> 10;
      w[3] = w[1] >> 10;
    } else if (WIDTH == 3) {
      // Field b takes bit b of plane 2, b + 1 of plane 1 << 1, b + 2 of plane 0 << 2. b <= 13.
      const u32 p0 = plane[0] << 2, p1 = plane[1] << 1, p2 = plane[2];
      constexpr u32 FIRST[3] = {0x12491249u, 0x24922492u, 0x09240924u};   // b = r, r + 3, ... <= 13
#pragma unroll
      for (int r = 0; r < 3; r++)
        w[r] = choose_bits(FIRST[r], p2, choose_bits(FIRST[r] << 1, p1, p0));
      w[3] = w[0] >> 8;
      w[4] = w[1] >> 8;
      w[5] = w[2] >> 8;
      const u32 s0 = plane[0] >> 12, s1 = plane[1] >> 13, s2 = plane[2] >> 14;
      w[6] = choose_bits(0x00010001u, s2, choose_bits(0x00020002u, s1, s0));   // input 14
      w[7] = choose_bits(0x00020002u, s2, choose_bits(0x00040004u, s1, s0));   // input 15
    } else {
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const u32 high = odd ? choose_bits(0xAAAAAAAAu, plane[0], plane[1] >> 1)
                             : choose_bits(0xAAAAAAAAu, plane[0] << 1, plane[1]);
        const u32 low = odd ? choose_bits(0xAAAAAAAAu, plane[2], plane[3] >> 1)
                            : choose_bits(0xAAAAAAAAu, plane[2] << 1, plane[3]);
        w[odd] = choose_bits(0xCCCCCCCCu, high << 2, low);        // inputs odd + 0, 4, 8, 12
        w[odd + 2] = choose_bits(0xCCCCCCCCu, high, low >> 2);    // inputs odd + 2, 6, 10, 14
        w[odd + 4] = w[odd] >> 8;
        w[odd + 6] = w[odd + 2] >> 8;
      }
    }
  }

  // Two half operands, inputs b and b + 16; b is a compile-time constant after unrolling.
  DEVICE u32 pair(int b) const {
    const u32 mask = ((1u << WIDTH) - 1) * 0x00010001u << field_position(b);
    if (WIDTH == 1) return w[b >= 10] & mask;
    if (WIDTH == 2) return w[(b & 1) + ((b & ~1) >= 10 ? 2 : 0)] & mask;
    if (WIDTH == 3) return w[b >= 14 ? b - 8 : b % 3 + (b >= 8 ? 3 : 0)] & mask;
    return w[(b & 1) + (b & 2) + ((b & ~3) >= 8 ? 4 : 0)] & mask;
  }
};
