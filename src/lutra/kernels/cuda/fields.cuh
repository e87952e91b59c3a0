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

__host__ __device__ constexpr int field_position(int b) { return WIDTH == 1 ? b % 10 : b % 8; }

// One instruction, whatever is known of the mask: the compiler would make two of nested ones.
DEVICE u32 choose_bits(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

DEVICE u32 rotate_left(u32 v, int by) { return __funnelshift_l(v, v, by); }

// The words of one row from which pairs are cut.
struct Fields {
  static constexpr int WORDS = WIDTH == 1 ? 2 : WIDTH == 2 ? 4 : WIDTH == 3 ? 7 : 8;
  u32 w[WORDS];

  // `plane` are the words of all planes (codes), or of one. The code of input b lies at bits b and up, plane
  // 0 highest, behind bit 31 at bit 0: in word b % WIDTH, and for b % 16 > 7 that word is rotated by 8.
  DEVICE void interleave(const u32* plane) {
    if (WIDTH == 1) {
      w[0] = plane[0];
      w[1] = w[0] >> 10;
    } else if (WIDTH == 2) {
      const u32 high = rotate_left(plane[0], 1);
      w[0] = choose_bits(0xAAAAAAAAu, high, plane[1]);
      w[1] = choose_bits(0x55555555u, high, plane[1]);
      w[2] = rotate_left(w[0], 24);
      w[3] = rotate_left(w[1], 24);
    } else if (WIDTH == 3) {
      // The words of 5 codes a half leave a bit of each half over: together those of input 15.
      const u32 high = rotate_left(plane[0], 2), middle = rotate_left(plane[1], 1);
      w[0] = choose_bits(0x92499249u, plane[2], choose_bits(0x24922492u, middle, high));
      w[1] = choose_bits(0x24922492u, plane[2], choose_bits(0x49254925u, middle, high));
      w[2] = choose_bits(0x49244924u, plane[2], choose_bits(0x92489248u, middle, high));
#pragma unroll
      for (int r = 0; r < 3; r++) w[3 + r] = rotate_left(w[r], 24);
      w[6] = (w[3] & 0x00800080u) | (w[4] & 0x01000100u) | (w[5] & 0x02000200u);
    } else {
      const u32 first = rotate_left(plane[0], 1), third = rotate_left(plane[2], 1);
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const u32 pairs = odd ? 0x55555555u : 0xAAAAAAAAu;
        const u32 high = rotate_left(choose_bits(pairs, first, plane[1]), 2);
        const u32 low = choose_bits(pairs, third, plane[3]);
        w[odd] = choose_bits(odd ? 0x99999999u : 0xCCCCCCCCu, high, low);
        w[odd + 2] = choose_bits(odd ? 0x66666666u : 0x33333333u, high, low);
        w[odd + 4] = rotate_left(w[odd], 24);
        w[odd + 6] = rotate_left(w[odd + 2], 24);
      }
    }
  }

  // Two half operands, inputs b and b + 16; b is a compile-time constant after unrolling.
  DEVICE u32 pair(int b) const {
    const u32 mask = ((1u << WIDTH) - 1) * 0x00010001u << field_position(b);
    if (WIDTH == 1) return w[b >= 10] & mask;
    if (WIDTH == 3 && b == 15) return w[6];
    return w[b % WIDTH + (b < 8 ? 0 : WIDTH)] & mask;
  }
};
