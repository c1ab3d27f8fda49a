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

constexpr int64_t kGrain = 16;  // Tensors that are worth a thread, of 60 in a call.

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

// Whether a test holds for each index; all threads look.
template <typename Test>
bool all_of(int64_t count, const Test& test) {
  std::atomic<bool> result{true};
  at::parallel_for(0, count, kGrain, [&](int64_t start, int64_t end) {
    for (int64_t i = start; i < end; ++i) {
      if (!test(i)) {
        result = false;
        return;
      }
    }
  });
  return result;
}

// Places of tensors in memory: the first elements of each, then the end.
class Places {
 public:
  Places(const Tensor& starts, const Tensor& memory)
      : starts_(starts.const_data_ptr<int64_t>()),
        count_(starts.numel() - 1),
        memory_(memory) {}

  bool hold(size_t count) const {
    return static_cast<int64_t>(count) == count_ && starts_[count_] == memory_.numel();
  }

  bool fit(const Tensor& tensor, int64_t i) const {
    return is_plain(tensor) && tensor.dtype() == memory_.dtype() &&
        tensor.numel() == starts_[i + 1] - starts_[i];
  }

  char* operator[](int64_t i) const {
    return static_cast<char*>(memory_.data_ptr()) + starts_[i] * memory_.itemsize();
  }

 private:
  const int64_t* starts_;
  int64_t count_;
  const Tensor& memory_;
};

// Copies plain memory; an empty tensor may have no address.
void copy(void* to, const void* from, size_t size) {
  if (size != 0) {
    std::memcpy(to, from, size);
  }
}

// Copies parameters to one piece of memory, and their gradients to another; returns
// false, and copies nothing, if one does not fit.
bool gather(
    TensorList params, const Tensor& starts, const Tensor& memory, const Tensor& grad_memory) {
  const Places places(starts, memory), grad_places(starts, grad_memory);
  std::vector<Tensor> grads(params.size());  // Kept, whatever other threads do.
  const int64_t count = params.size();
  return places.hold(count) && grad_places.hold(count) &&
      all_of(count, [&](int64_t i) {
        grads[i] = grad_of(params[i]);
        return grads[i].defined() && grads[i].sizes() == params[i].sizes() &&
            grad_places.fit(grads[i], i) && places.fit(params[i], i);
      }) &&
      all_of(count, [&](int64_t i) {
        copy(grad_places[i], grads[i].const_data_ptr(), grads[i].nbytes());
        copy(places[i], params[i].const_data_ptr(), params[i].nbytes());
        return true;
      });
}

// Copies memory to parameters, and counts it, so that autograd notices; returns false,
// and copies nothing, if one does not fit.
bool scatter(TensorList params, const Tensor& starts, const Tensor& memory) {
  const Places places(starts, memory);
  const int64_t count = params.size();
  return places.hold(count) &&
      all_of(count, [&](int64_t i) { return places.fit(params[i], i); }) &&
      all_of(count, [&](int64_t i) {
        copy(params[i].mutable_data_ptr(), places[i], params[i].nbytes());
        if (!params[i].is_inference()) {
          params[i].unsafeGetTensorImpl()->bump_version();
        }
        return true;
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
