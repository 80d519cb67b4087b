// The CUDA kernels' part of the module: like bindings.cpp, with a stream as the last argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "conv_moments.h"
#include "conv_products.h"
#include "conv_sqnorm.h"
#include "embedding.h"
#include "grad_sqnorm.h"
#include "norm_grads.h"
#include "random_signs.h"
#include "sign_product.h"
#include "tuples.h"

namespace py = pybind11;
using namespace gradclust;

namespace {

void raise_if(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA kernel failed: ") + error);
}

using nogil = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("grad_sqnorm_cuda", [](const LinearTuple& f, uintptr_t out, uintptr_t stream) {
    raise_if(grad_sqnorm_cuda(linear(f), pointer(out), pointer(stream)));
  }, nogil());
  m.def("cluster_sums_cuda", [](const RowsTuple& points, uintptr_t sorted, uintptr_t order, int64_t K, uintptr_t begin,
                                uintptr_t counts, uintptr_t partial, uintptr_t sums, uintptr_t stream) {
    raise_if(cluster_sums_cuda(rows(points), pointer<int32_t>(sorted), pointer<int64_t>(order), K,
                               pointer<int64_t>(begin), pointer<int64_t>(counts), pointer<double>(partial),
                               pointer(sums), pointer(stream)));
  }, nogil());
  using SortedTuple = std::array<uintptr_t, 3>;  // labels, rows, begin
  auto sorted = [](const SortedTuple& t) {
    return SortedRows{pointer<int32_t>(t[0]), pointer<int64_t>(t[1]), pointer<int64_t>(t[2])};
  };
  m.def("exact_moves_cuda_workspace", &exact_moves_cuda_workspace);
  m.def("cluster_objective_cuda", [=](const RowsTuple& points, const SortedTuple& at, int64_t K, uintptr_t workspace,
                                      uintptr_t arrived, uintptr_t J, uintptr_t stream) {
    raise_if(cluster_objective_cuda(rows(points), sorted(at), K, pointer<double>(workspace), pointer<uint64_t>(arrived),
                                    pointer<double>(J), pointer(stream)));
  }, nogil());
  m.def("exact_moves_cuda", [=](const RowsTuple& points, const SortedTuple& at, int64_t K, uintptr_t center,
                                uintptr_t order, double tie, uintptr_t workspace, uintptr_t arrived, uintptr_t labels,
                                uintptr_t stream) {
    raise_if(exact_moves_cuda(rows(points), sorted(at), K, pointer<double>(center), pointer<int64_t>(order), tie,
                              pointer<double>(workspace), pointer<uint64_t>(arrived), pointer<int64_t>(labels),
                              pointer(stream)));
  }, nogil());
  m.def("visiting_keys_cuda", [](uintptr_t key, int64_t N, int64_t seed, uintptr_t stream) {
    raise_if(visiting_keys_cuda(pointer<int64_t>(key), N, seed, pointer(stream)));
  }, nogil());
  m.def("random_signs_cuda", [](uintptr_t out, int dtype, int64_t rows, int64_t cols, uint32_t key0, uint32_t key1,
                                double scale, bool transposed, uintptr_t stream) {
    raise_if(random_signs_cuda(pointer(out), DType(dtype), rows, cols, key0, key1, scale, transposed, pointer(stream)));
  }, nogil());
  m.def("sign_product_cuda", [](const SignTuple& t, double scale, int pieces, uintptr_t out, uintptr_t stream) {
    raise_if(sign_product_cuda(signs(t, scale), pieces, pointer(out), pointer(stream)));
  }, nogil());
  m.def("conv_sqnorm_cuda_partials", [](const ConvTuple& f, int route) {
    return conv_sqnorm_cuda_partials(conv(f), ConvCudaRoute(route));
  });
  m.def("conv_sqnorm_cuda_in_bulk", [](const ConvTuple& f, int route) {
    return conv_sqnorm_cuda_in_bulk(conv(f), ConvCudaRoute(route));
  });
  m.def("conv_sqnorm_cuda", [](const ConvTuple& f, int route, uintptr_t partial, uintptr_t out, uintptr_t stream) {
    raise_if(conv_sqnorm_cuda(conv(f), ConvCudaRoute(route), pointer(partial), pointer(out), pointer(stream)));
  }, nogil());
  m.def("embedding_sqnorm_cuda_blocks", [](const EmbeddingTuple& f) { return embedding_sqnorm_cuda_blocks(embedding(f)); });
  m.def("embedding_sqnorm_cuda", [](const EmbeddingTuple& f, uintptr_t sorted, uintptr_t order, uintptr_t partial,
                                    uintptr_t out, uintptr_t stream) {
    raise_if(embedding_sqnorm_cuda(embedding(f), pointer<int64_t>(sorted), pointer<int64_t>(order), pointer(partial),
                                   pointer(out), pointer(stream)));
  }, nogil());
  m.def("embedding_gram_cuda", [](const EmbeddingTuple& f, uintptr_t sorted, uintptr_t order, uintptr_t out,
                                  uintptr_t stream) {
    raise_if(embedding_gram_cuda(embedding(f), pointer<int64_t>(sorted), pointer<int64_t>(order), pointer(out),
                                 pointer(stream)));
  }, nogil());
  m.def("embedding_moments_cuda", [](const EmbeddingTuple& f, uintptr_t sorted, uintptr_t order, uintptr_t first,
                                     uintptr_t second, uintptr_t stream) {
    raise_if(embedding_moments_cuda(embedding(f), pointer<int64_t>(sorted), pointer<int64_t>(order), pointer(first),
                                    pointer(second), pointer(stream)));
  }, nogil());
  m.def("embedding_products_cuda_splits", [](const EmbeddingTuple& f, int64_t P, int64_t width) {
    return embedding_products_cuda_splits(embedding(f), P, width);
  });
  m.def("embedding_sketch_cuda", [](const EmbeddingTuple& f, uintptr_t left, uintptr_t right, int64_t P, int64_t Q,
                                    uintptr_t partial, uintptr_t out, uintptr_t stream) {
    raise_if(embedding_sketch_cuda(embedding(f), pointer(left), pointer(right), P, Q, pointer(partial), pointer(out),
                                   pointer(stream)));
  }, nogil());
  m.def("embedding_dot_cuda", [](const EmbeddingTuple& f, uintptr_t center_index, uintptr_t center_grad, int64_t K,
                                 int64_t rank, uintptr_t partial, uintptr_t out, uintptr_t stream) {
    raise_if(embedding_dot_cuda(embedding(f), pointer(center_index), pointer(center_grad), K, rank, pointer(partial),
                                pointer(out), pointer(stream)));
  }, nogil());
  m.def("conv_moments_cuda_slices", [](const ConvTuple& f, int route) {
    return conv_moments_cuda_slices(conv(f), ConvCudaRoute(route));
  });
  m.def("conv_moments_cuda_in_bulk", [](const ConvTuple& f, int route) {
    return conv_moments_cuda_in_bulk(conv(f), ConvCudaRoute(route));
  });
  m.def("conv_moments_cuda", [](const ConvTuple& f, int route, uintptr_t partial, uintptr_t first, uintptr_t second,
                                uintptr_t stream) {
    raise_if(conv_moments_cuda(conv(f), ConvCudaRoute(route), pointer(partial), pointer(first), pointer(second),
                               pointer(stream)));
  }, nogil());
  m.def("conv_products_cuda_pitches", [](int route) {
    ConvPitches pitches = conv_products_cuda_pitches(ConvCudaRoute(route));
    return std::array<int64_t, 2>{pitches.rows, pitches.columns};
  });
  m.def("conv_products_cuda_parts", [](const ConvTuple& f, int route, int what) {
    return conv_products_cuda_parts(conv(f), ConvCudaRoute(route), ConvProduct(what));
  });
  // sides: (rows, columns, count, rank, row_pitch, column_pitch)
  m.def("conv_products_cuda", [](const ConvTuple& f, int route, int what, const std::array<int64_t, 6>& s, uintptr_t out,
                                 uintptr_t stream) {
    ConvSides sides{pointer(uintptr_t(s[0])), pointer(uintptr_t(s[1])), s[2], s[3], s[4], s[5]};
    raise_if(conv_products_cuda(conv(f), ConvCudaRoute(route), ConvProduct(what), sides, pointer(out), pointer(stream)));
  }, nogil());
  m.def("norm_grads_cuda", [](const NormTuple& f, double eps, bool rms, int slices, uintptr_t stats, uintptr_t partial,
                              uintptr_t weight, uintptr_t bias, uintptr_t stream) {
    raise_if(norm_grads_cuda(norm(f), eps, rms, slices, pointer(stats), pointer(partial), pointer(weight), pointer(bias),
                             pointer(stream)));
  }, nogil());
}
