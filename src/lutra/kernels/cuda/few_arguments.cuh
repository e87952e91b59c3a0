// Arguments of the kernels for few tokens, as `_FewArguments` of products.py.

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const u16* x;            // [tokens][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;   // tokens <= TOKENS
  int tiles, items, groups;        // groups stored per row
  int items_per_group;             // 1 unless GROUP == 256
  int panel_items, k_warps;
};
