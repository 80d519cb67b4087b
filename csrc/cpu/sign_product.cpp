// scale · vectors Sᵀ with a random matrix of signs that is never stored.
//
// v1  A task takes up to 128 rows and some panels of outputs. For 256 columns at a time it makes a panel's entries ±scale in
//     the L1 cache (Philox and the spreading of its bits over lanes: under one instruction an entry, lanes = outputs) and
//     multiplies all of its rows with them; the rows' piece of 256 columns stays in the L2 cache meanwhile. An output is
//     one chain of multiply-adds over its columns, in order: the same bits on any number of threads and in any batch.
#include "gemm.h"
#include "sign_product.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t ROWS = 128;    // of a task: the entries of a panel serve so many products
constexpr int64_t OUTPUTS = 288;  // most outputs of a task, so that its sums stay in the L2 cache
constexpr int64_t WORDS = DEPTH / 32;

template <typename acc> struct Bits;
template <> struct Bits<float> { using type = uint32_t; };
template <> struct Bits<double> { using type = uint64_t; };

// words[4 · NR] of Philox4x32-10 (Salmon et al. 2011) at counters (block, row + i, 0, 0): word w of row i at w · NR + i.
template <typename acc>
__attribute__((noinline)) void philox_words(typename Bits<acc>::type* words, uint32_t block, uint32_t row, uint32_t key0,
                                            uint32_t key1) {
  constexpr int N = int(NR<acc>);
  uint32_t c0[N], c1[N], c2[N], c3[N];
  for (int i = 0; i < N; ++i) c0[i] = block, c1[i] = row + uint32_t(i), c2[i] = c3[i] = 0;
  for (int turn = 0; turn < 10; ++turn) {
    for (int i = 0; i < N; ++i) {
      uint64_t even = uint64_t(0xD2511F53u) * c0[i], odd = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(odd >> 32) ^ c1[i] ^ key0, c1[i] = uint32_t(odd);
      c2[i] = uint32_t(even >> 32) ^ c3[i] ^ key1, c3[i] = uint32_t(even);
    }
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < N; ++i)
    words[i] = c0[i], words[N + i] = c1[i], words[2 * N + i] = c2[i], words[3 * N + i] = c3[i];
}

// panel[k * width + i] = ±scale for `depth` columns and `width` outputs.
template <typename acc, int V>
__attribute__((noinline)) void spread(acc* panel, const typename Bits<acc>::type* words, int64_t depth, acc scale) {
  using bits_t = typename Bits<acc>::type;
  typedef bits_t bits_v __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
  typedef bits_t loose __attribute__((vector_size(GRADCLUST_VECTOR_BYTES), aligned(4), may_alias));
  constexpr int L = LANES<acc>, TOP = 8 * int(sizeof(acc)) - 1;
  const bits_t sign = bits_t(1) << TOP;
  bits_t positive;
  memcpy(&positive, &scale, sizeof scale);
  for (int64_t k = 0; k < depth; k += 32, words += NR<acc>) {
    bits_v word[V];
    for (int v = 0; v < V; ++v) word[v] = *reinterpret_cast<const loose*>(words + v * L);
    int n = int(min_of(32, depth - k));
    for (int j = 0; j < n; ++j, panel += V * L)
      for (int v = 0; v < V; ++v)
        *reinterpret_cast<loose*>(panel + v * L) = ((word[v] << (TOP - j)) & sign) ^ positive;
  }
}

// The 128 signs of Philox at counters (block, column + k, 0, 0), for `depth` columns: two words a column.
template <typename acc>
void make_columns(uint64_t* columns, const SignFactors& f, int64_t output, int64_t column, int64_t depth) {
  constexpr int N = int(NR<acc>);
  typename Bits<acc>::type words[4 * N];
  for (int64_t k = 0; k < depth; k += N) {
    philox_words<acc>(words, uint32_t(output / 128), uint32_t(column + k), f.key0, f.key1);
    for (int i = 0; i < N && k + i < depth; ++i) {
      columns[2 * (k + i)] = uint64_t(words[i]) | uint64_t(words[N + i]) << 32;
      columns[2 * (k + i) + 1] = uint64_t(words[2 * N + i]) | uint64_t(words[3 * N + i]) << 32;
    }
  }
}

// As `spread`, from columns whose bits are neighbouring outputs; the panel begins at bit `first`.
template <typename acc>
__attribute__((noinline)) void spread_columns(acc* panel, const uint64_t* columns, int64_t first, int64_t width,
                                              int64_t depth, acc scale) {
  using bits_t = typename Bits<acc>::type;
  typedef bits_t bits_v __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
  typedef bits_t loose __attribute__((vector_size(GRADCLUST_VECTOR_BYTES), aligned(4), may_alias));
  constexpr int L = LANES<acc>;
  bits_t positive;
  memcpy(&positive, &scale, sizeof scale);
  const bits_v none = {}, sign = none + (bits_t(1) << (8 * sizeof(acc) - 1)), plus = none + positive;
  bits_v mine;
  for (int lane = 0; lane < L; ++lane) mine[lane] = bits_t(1) << lane;
  for (int64_t k = 0; k < depth; ++k, columns += 2) {
    uint64_t bits = first < 64 ? columns[0] >> first : columns[1] >> (first - 64);
    if (first > 0 && first < 64) bits |= columns[1] << (64 - first);
    for (int64_t v = 0; v < width; v += L, panel += L, bits >>= L)
      *reinterpret_cast<loose*>(panel) = ((bits_v)(((none + bits_t(bits)) & mine) != none) & sign) ^ plus;
  }
}

template <typename acc>
void make_panel(acc* panel, const SignFactors& f, int64_t output, int64_t width, int64_t column, int64_t depth) {
  typename Bits<acc>::type words[WORDS * NR<acc>];
  for (int64_t k = 0; k < depth; k += 128)
    philox_words<acc>(words + k / 32 * NR<acc>, uint32_t((column + k) / 128), uint32_t(output), f.key0, f.key1);
  constexpr int64_t L = LANES<acc>;
  if (NV >= 3 && width == 3 * L)
    spread<acc, NV>(panel, words, depth, acc(f.scale));
  else if (width == 2 * L)
    spread<acc, 2>(panel, words, depth, acc(f.scale));
  else
    spread<acc, 1>(panel, words, depth, acc(f.scale));
}

template <typename in_t>
void multiply_block(const SignFactors& f, int64_t row, int64_t rows, int64_t output, int64_t outputs, acc_t<in_t>* out) {
  using acc = acc_t<in_t>;
  constexpr int64_t M = MR<acc>;
  static thread_local Scratch scratch;
  // Transposed, a counter serves 128 neighbouring outputs: panels stay inside of such a group.
  const int64_t group = f.transposed ? 128 : outputs;
  const int64_t padded = Panels<acc>{outputs}.padded(), padded_rows = round_up(rows, M);
  uint64_t columns[2 * DEPTH];
  acc* panel = scratch.get<acc>(DEPTH * NR<acc> + padded_rows * (DEPTH + padded));
  acc *x = panel + DEPTH * NR<acc>, *sums = x + padded_rows * DEPTH;  // [rows, DEPTH], [rows, padded]
  const in_t* vectors = static_cast<const in_t*>(f.vectors) + row * f.stride;
  int64_t k = 0;
  do {  // also for D = 0, which writes zeros
    const int64_t depth = min_of(DEPTH, f.D - k);
    const acc* first = as_accumulator(vectors + k);  // null for half types, which are converted once for all panels
    const int64_t stride = first ? f.stride : DEPTH;
    if (!first) {
      for (int64_t i = 0; i < rows; ++i) convert(vectors + i * f.stride + k, x + i * DEPTH, depth);
      first = x;
    }
    for (int64_t j = 0, begin = 0, width; j < outputs; j += width) {  // begin: of the group
      if (j == begin + group) begin = j;
      if (f.transposed && j == begin) make_columns<acc>(columns, f, output + j, k, depth);
      width = Panels<acc>{min_of(group, outputs - begin)}.width(j - begin);
      if (f.transposed)
        spread_columns<acc>(panel, columns, j - begin, width, depth, acc(f.scale));
      else
        make_panel(panel, f, output + j, width, k, depth);
      for (int64_t i = 0; i < rows; i += M) {
        RowPointers<acc> a;
        for (int64_t m = 0; m < M; ++m) a.p[m] = first + min_of(i + m, rows - 1) * stride;
        tile_product<acc>(width, depth, a, panel, width, sums + i * padded + j, padded, k > 0);
      }
    }
    k += DEPTH;
  } while (k < f.D);
  for (int64_t i = 0; i < rows; ++i) memcpy(out + (row + i) * f.R + output, sums + i * padded, outputs * sizeof(acc));
}

}  // namespace

void sign_product_cpu(const SignFactors& f, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    const int64_t unit = f.transposed ? 128 : NR<acc>, panels = (f.R + unit - 1) / unit;  // of outputs that stay together
    int64_t row_blocks = (f.B + ROWS - 1) / ROWS;
    if (threads > 1) row_blocks = max_of(row_blocks, min_of(threads, f.B / (ROWS / 4)));
    const int64_t rows = row_blocks ? round_up((f.B + row_blocks - 1) / row_blocks, MR<acc>) : 0;
    int64_t most = OUTPUTS / unit;
    // Work for every thread: fewer rows, then fewer outputs a task. What is computed does not depend on it.
    if (threads > 1) most = max_of(1, min_of(most, row_blocks * panels / (2 * threads)));
    const int64_t groups = (panels + most - 1) / most, each = (panels + groups - 1) / groups * unit;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < row_blocks * groups; ++task) {
      const int64_t row = task / groups * rows, output = task % groups * each;
      if (row < f.B && output < f.R)
        multiply_block<in_t>(f, row, min_of(rows, f.B - row), output, min_of(each, f.R - output), static_cast<acc*>(out));
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
