// Every position's patch times a bank of filters, and every position's grad times a matrix: 2·T·I·n FLOP.
//
// v1  Lanes are filters, rows are positions read from the padded planes: the micro-kernel's broadcasts of neighbouring
//     positions share a cache line, and no patch is unfolded. Channels are cut into blocks whose filters stay in L1;
//     short images share a panel of positions with other examples, so that every visit of the filters is worth it.
#pragma once
#include "conv_direct.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t FILTER_STEPS = 256;   // a block of filters takes 16 KB
constexpr int64_t PANEL_POSITIONS = 96;  // at least so many positions are filtered together, if the batch has them

// A bank of n columns packed as [panels of TILE_WIDTH columns][block of channels][element][channel in block][TILE_WIDTH].
template <typename T> struct Bank {
  int64_t n, C, kernel, block;  // block: channels in a block
  T* packed;
  T* constant;  // [panels, TILE_WIDTH]: what the constant feature adds; null without one

  int64_t panels() const { return ceil_div(n, TILE_WIDTH<T>); }
  int64_t panel_size() const { return C * kernel * TILE_WIDTH<T>; }
  const T* panel(int64_t j) const { return packed + j * panel_size(); }
};

template <typename T> int64_t bank_size(int64_t n, int64_t C, int64_t kernel, bool constant) {
  return round_up(n, TILE_WIDTH<T>) * (C * kernel + constant);
}

// Feature i of column j is column(j)[i * step], i = c·kernel + e; feature C·kernel is the constant one's.
template <typename T, typename Column>
Bank<T> pack_bank(T* memory, int64_t n, int64_t C, int64_t kernel, bool constant, int64_t step, int threads,
                  Column&& column) {
  constexpr int64_t N = TILE_WIDTH<T>;
  Bank<T> bank{n, C, kernel, max_of(1, FILTER_STEPS / kernel), memory, nullptr};
  if (constant) bank.constant = memory + bank.panels() * bank.panel_size();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t panel = 0; panel < bank.panels(); ++panel) {
    const int64_t valid = min_of(N, n - panel * N);
    const T* from[N];
    for (int64_t j = 0; j < N; ++j) from[j] = column(panel * N + min_of(j, valid - 1));
    auto put = [&](T* to, int64_t i) {
      for (int64_t j = 0; j < N; ++j) to[j] = j < valid ? from[j][i * step] : T(0);
    };
    T* to = memory + panel * bank.panel_size();
    for (int64_t c0 = 0; c0 < C; c0 += bank.block)
      for (int64_t e = 0; e < kernel; ++e)
        for (int64_t c = c0; c < min_of(C, c0 + bank.block); ++c, to += N) put(to, c * kernel + e);
    if (constant) put(bank.constant + panel * N, C * kernel);
  }
  return bank;
}

// Positions in packed planes: where each lies, how far its kernel elements and its channels are.
struct View {
  const int64_t* position;  // [count]
  int64_t count;
  const int64_t* tap;  // [kernel]
  int64_t plane;
};

// out [count, TILE_WIDTH] = one panel of the bank at every position; TILE_ROWS more rows are overwritten. The bank may have
// more channels than the view (a matrix for all groups): first_channel says where the view's begin, `channels` how many.
template <typename T> void project_panel(const T* planes, const View& view, const Bank<T>& bank, int64_t panel,
                                         int64_t first_channel, int64_t channels, T* out) {
  constexpr int64_t N = TILE_WIDTH<T>;
  const T* packed = bank.panel(panel);
  if (bank.constant)
    for (int64_t t = 0; t < view.count; ++t) memcpy(out + t * N, bank.constant + panel * N, N * sizeof(T));
  const bool one_element = bank.kernel == 1;  // then blocks do not matter to the order of channels
  const int64_t block = one_element ? FILTER_STEPS : bank.block;
  for (int64_t c = 0; c < channels; c += block) {
    int64_t n = min_of(block, channels - c);
    const T* b = packed + (first_channel + c) * bank.kernel * N;
    for (int64_t t = 0; t < view.count; t += TILE_ROWS) {
      const T* a[TILE_ROWS];
      for (int r = 0; r < TILE_ROWS; ++r) a[r] = planes + c * view.plane + view.position[min_of(t + r, view.count - 1)];
      multiply<T>(out + t * N, N, bank.constant || c > 0, a, view.tap, bank.kernel, n, view.plane, b);
    }
  }
}

// grad of one group of one example, dense: [channels, pitch], t fastest.
template <typename in_t> void pack_grad(const ConvFactors& f, int64_t b, int64_t o0, int64_t channels, int64_t pitch,
                                        acc_t<in_t>* __restrict to) {
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + o0 * f.grad_stride[1];
  int64_t step = f.grad_stride[4];
  for (int64_t o = 0; o < channels; ++o) {
    acc_t<in_t>* out = to + o * pitch;
    for (int64_t z = 0; z < f.out[0]; ++z)
      for (int64_t y = 0; y < f.out[1]; ++y, out += f.out[2]) {
        const in_t* row = grad + o * f.grad_stride[1] + z * f.grad_stride[2] + y * f.grad_stride[3];
        if (step == 1)
          for (int64_t x = 0; x < f.out[2]; ++x) out[x] = load(row[x]);
        else
          for (int64_t x = 0; x < f.out[2]; ++x) out[x] = load(row[x * step]);
      }
  }
}

// Several examples' images and grads of one group beside each other, as project_panel takes them.
template <typename T> struct Examples {
  int64_t most;               // examples together
  int64_t image_size, grad_size, grad_pitch;
  Workspace tables;
  View image, grad;           // of `most` examples

  void plan(const ConvFactors& f, const DirectPlan& p) {
    most = max_of(1, min_of(f.B, PANEL_POSITIONS / p.T));
    grad_pitch = round_up(p.T, 16) | 16;
    image_size = p.C * p.plane, grad_size = p.O * grad_pitch;
    tables.reserve(2 * Workspace::bytes<int64_t>(most * p.T) + Workspace::bytes<int64_t>(1));
    int64_t *at_image = tables.take<int64_t>(most * p.T), *at_grad = tables.take<int64_t>(most * p.T);
    int64_t* nowhere = tables.take<int64_t>(1);
    *nowhere = 0;
    for (int64_t e = 0; e < most; ++e)
      for (int64_t t = 0; t < p.T; ++t) {
        at_image[e * p.T + t] = e * image_size + p.position[t];
        at_grad[e * p.T + t] = e * grad_size + t;
      }
    image = {at_image, most * p.T, p.column_offset, p.plane};
    grad = {at_grad, most * p.T, nowhere, grad_pitch};
  }
};

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
