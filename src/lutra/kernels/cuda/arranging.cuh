// What the kernels that put x in order share.

DEVICE u32 largest_of(u32 a, u32 b) {   // of 16-bit numbers
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE void store_word(u32 shared, u32 rank, u32 v) {   // in a block of the cluster
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.u32 [a], %2; }"
               :: "r"(shared), "r"(rank), "r"(v) : "memory");
}

// Eight inputs of a row, zeros past its end.
DEVICE uint4 read(const u16* row, int first, int in_features, bool wide) {
  if (wide && first + 8 <= in_features) return *(const uint4*)(row + first);
  u32 v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = first + 2 * i;
    const u32 low = at < in_features ? row[at] : 0, high = at + 1 < in_features ? row[at + 1] : 0;
    v[i] = low | high << 16;
  }
  return make_uint4(v[0], v[1], v[2], v[3]);
}
DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
