// Products of stored rows: what conv_gram and conv_dot do with a unit of every example's G_b.
#pragma once
#include "conv_units.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t PRODUCT_ROWS = 96;

// Sums over units of rows · columnsᵀ, kept panel by panel: [panels][rows, rounded up][width].
template <typename T> struct Products {
  int64_t rows, columns;
  T* sums;
  int64_t padded_rows() const { return round_up(rows, MR<T>); }
  int64_t padded_columns() const { return round_up(columns, LANES<T>); }
  int64_t size() const { return padded_rows() * padded_columns(); }
  int64_t row_blocks() const { return ceil_div(rows, PRODUCT_ROWS); }
  int64_t tasks() const { return ceil_div(columns, NR<T>) * row_blocks(); }
  int64_t width(int64_t begin) const { return Panels<T>{columns}.width(begin); }
  T at(int64_t row, int64_t column) const {
    int64_t begin = column / NR<T> * NR<T>;
    return sums[begin * padded_rows() + row * width(begin) + column - begin];
  }

  // One task's share of a [rows, depth] times the transpose of b [columns, depth]. With LOWER only entries on and below
  // the diagonal are needed.
  template <bool LOWER> void add(int64_t task, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth) {
    const int64_t begin = task / row_blocks() * NR<T>, panel_width = width(begin);
    int64_t first = task % row_blocks() * PRODUCT_ROWS, end = min_of(rows, first + PRODUCT_ROWS);
    if (LOWER) first = max_of(first, begin);
    if (first >= end) return;
    T panel[DEPTH * NR<T>], tile[MR<T> * NR<T>];
    T* to = sums + begin * padded_rows();
    for (int64_t k = 0; k < depth; k += DEPTH) {
      int64_t n = min_of(DEPTH, depth - k);
      pack_rows(panel, panel_width, b + begin * b_stride + k, b_stride, n, min_of(panel_width, columns - begin));
      for (int64_t row = first; row < end; row += MR<T>) {
        RowPointers<T> from;
        for (int64_t i = 0; i < MR<T>; ++i) from.p[i] = a + min_of(row + i, rows - 1) * a_stride + k;
        // A chain of multiply-adds no longer than DEPTH, then one sum: a chain over all of G_b would lose a digit.
        tile_product<T>(panel_width, n, from, panel, panel_width, tile, panel_width, false);
        for (int64_t j = 0; j < MR<T> * panel_width; j += LANES<T>)
          store_vec(to + row * panel_width + j, load_vec(to + row * panel_width + j) + load_vec(tile + j));
      }
    }
  }
};

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
