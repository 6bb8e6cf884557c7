// AMX's tile instructions in plain C++, under the names of the compiler's intrinsics: what they do, for machines that
// cannot. Included inside the anonymous namespace of isa_emulated.cpp.

// Where the compiler has them as macros.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct TileConfig {  // as LDTILECFG reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

thread_local TileConfig tile_config;
thread_local uint8_t tile_data[8][16][64];

inline void _tile_loadconfig(const void* config) { std::memcpy(&tile_config, config, sizeof tile_config); }
inline void _tile_release() { std::memset(tile_data, 0xff, sizeof tile_data); }
inline void _tile_zero(int tile) { std::memset(tile_data[tile], 0, sizeof tile_data[tile]); }
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < tile_config.rows[tile]; ++row)
    std::memcpy(tile_data[tile][row], static_cast<const char*>(from) + row * stride, tile_config.row_bytes[tile]);
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tile_config.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile_data[tile][row], tile_config.row_bytes[tile]);
}
inline void _tile_dpbf16ps(int sum, int a, int b) {
  for (int row = 0; row < tile_config.rows[sum]; ++row)
    for (int pair = 0; pair < tile_config.row_bytes[a] / 4; ++pair) {
      Bf16 x[2];
      std::memcpy(x, &tile_data[a][row][pair * 4], sizeof x);
      for (int column = 0; column < tile_config.row_bytes[sum] / 4; ++column) {
        Bf16 w[2];
        float value;
        std::memcpy(w, &tile_data[b][pair][column * 4], sizeof w);
        std::memcpy(&value, &tile_data[sum][row][column * 4], sizeof value);
        value += widen(x[0]) * widen(w[0]) + widen(x[1]) * widen(w[1]);
        std::memcpy(&tile_data[sum][row][column * 4], &value, sizeof value);
      }
    }
}
