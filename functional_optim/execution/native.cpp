// Operators over many small tensors on the CPU.
//
// Called from Python tensor by tensor, each of these costs more than the arithmetic on a
// small tensor. Nothing here computes. NAMESPACE is replaced in _native.py.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kGrain = 64;  // Tensors that are worth a thread.

// `Tensor::grad` warns where a parameter is no leaf.
const Tensor& grad_of(const Tensor& param) {
  return param.unsafeGetTensorImpl()->grad();
}

// Whether the elements are in memory as they are read, one after the other.
bool is_plain(const Tensor& tensor) {
  return tensor.layout() == c10::kStrided && tensor.is_cpu() && tensor.has_storage() &&
      !tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor.is_conj() &&
      !tensor.is_neg() && !tensor._is_zerotensor() && tensor.is_contiguous();
}

// The number of elements, the dtype, and the strides unless contiguous, as one number.
int64_t geometry_of(const Tensor& tensor) {
  auto hash = static_cast<uint64_t>(tensor.scalar_type()) + 256 * tensor.numel();
  if (!tensor.is_contiguous()) {
    for (const int64_t stride : tensor.strides()) {
      hash = hash * 1000003 + stride + 1;
    }
  }
  return static_cast<int64_t>(hash);
}

// The same numbers are in _native.py.
constexpr int64_t kMoved = 1;    // A parameter has other memory, or another layout.
constexpr int64_t kChanged = 2;  // Other parameters have a gradient.
constexpr int64_t kOdd = 4;      // A gradient is sparse, or of another dtype.

// Compares parameters with the last scan. A row of `seen` has a parameter's address, its
// geometry, and whether it has a gradient.
int64_t scan(TensorList params, const Tensor& seen) {
  auto* rows = static_cast<int64_t*>(seen.mutable_data_ptr());
  std::atomic<int64_t> result{0};
  at::parallel_for(0, params.size(), kGrain, [&](int64_t start, int64_t end) {
    int64_t found = 0;
    for (int64_t i = start; i < end; ++i) {
      const Tensor& param = params[i];
      const Tensor& grad = grad_of(param);
      const auto replaced = [&](int64_t column, int64_t value) {
        return std::exchange(rows[3 * i + column], value) != value;
      };
      const auto address = reinterpret_cast<int64_t>(param.const_data_ptr());
      const bool moved = replaced(0, address);
      found |= replaced(1, geometry_of(param)) || moved ? kMoved : 0;
      found |= replaced(2, grad.defined()) ? kChanged : 0;
      if (grad.defined() &&
          (grad.layout() != c10::kStrided || grad.dtype() != param.dtype())) {
        found |= kOdd;
      }
    }
    result |= found;
  });
  return result;
}

// Calls `copy` with each tensor, and returns whether all calls did.
template <typename Copy>
bool copy_each(TensorList tensors, const Copy& copy) {
  std::atomic<bool> result{true};
  at::parallel_for(0, tensors.size(), kGrain, [&](int64_t start, int64_t end) {
    for (int64_t i = start; i < end; ++i) {
      if (!copy(tensors[i], i)) {
        result = false;
      }
    }
  });
  return result;
}

// Where the elements of tensor i have their place in `memory`; null if they do not fit.
char* place_of(const Tensor& tensor, const Tensor& memory, const int64_t* starts, int64_t i) {
  if (!is_plain(tensor) || tensor.dtype() != memory.dtype() ||
      tensor.numel() != starts[i + 1] - starts[i]) {
    return nullptr;
  }
  return static_cast<char*>(memory.data_ptr()) + starts[i] * memory.itemsize();
}

bool gather_one(const Tensor& tensor, const Tensor& memory, const int64_t* starts, int64_t i) {
  char* place = place_of(tensor, memory, starts, i);
  if (place != nullptr && tensor.numel() != 0) {  // An empty one may have no address.
    std::memcpy(place, tensor.const_data_ptr(), tensor.nbytes());
  }
  return place != nullptr;
}

// Copies parameters to one piece of memory, and their gradients to another. `starts` has
// the places of their first elements, and the end. Returns false if one does not fit;
// what was copied then is of no use.
bool gather(
    TensorList params, const Tensor& starts, const Tensor& memory, const Tensor& grad_memory) {
  const auto* places = starts.const_data_ptr<int64_t>();
  return copy_each(params, [&](const Tensor& param, int64_t i) {
    const Tensor grad = grad_of(param);  // Kept, whatever other threads do to parameters.
    return grad.defined() && grad.sizes() == param.sizes() &&
        gather_one(grad, grad_memory, places, i) && gather_one(param, memory, places, i);
  });
}

// Copies memory to parameters, and counts it, so that autograd notices. Returns false if
// one does not fit: it keeps its elements.
bool scatter(TensorList params, const Tensor& starts, const Tensor& memory) {
  const auto* places = starts.const_data_ptr<int64_t>();
  return copy_each(params, [&](const Tensor& param, int64_t i) {
    const char* place = place_of(param, memory, places, i);
    if (place != nullptr && param.numel() != 0) {
      std::memcpy(param.mutable_data_ptr(), place, param.nbytes());
    }
    if (place != nullptr && !param.is_inference()) {
      param.unsafeGetTensorImpl()->bump_version();
    }
    return place != nullptr;
  });
}

}  // namespace

TORCH_LIBRARY(NAMESPACE, library) {
  library.def("scan(Tensor[] params, Tensor(a!) seen) -> int");
  library.def(
      "gather(Tensor[] params, Tensor starts, Tensor(a!) to, Tensor(b!) grads_to) -> bool");
  library.def("scatter(Tensor(a!)[] params, Tensor starts, Tensor memory) -> bool");
}

TORCH_LIBRARY_IMPL(NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("scan", scan);
  library.impl("gather", gather);
  library.impl("scatter", scatter);
}
