#include "cpu/check.h"

namespace mmkern {
namespace {

using Sizes = std::initializer_list<int64_t>;

std::string text(const int64_t* sizes, int64_t count, Sizes tail = {}) {
  std::ostringstream out;
  out << "(";
  const char* comma = "";
  const auto add = [&](int64_t n) { out << comma << n, comma = ", "; };
  for (int64_t d = 0; d < count; ++d) add(sizes[d]);
  for (const int64_t n : tail) add(n);
  out << ")";
  return out.str();
}

template <class Value, class Get>
Value ask(const Get& get) {
  Value value{};
  STABLE_TORCH_ERROR_CODE_CHECK(get(&value));
  return value;
}

}  // namespace

Checked::Checked(const Tensor& t, const char* name_) : name(name_) {
  const AtenTensorHandle handle = t.get();
  if (!ask<bool>([&](bool* to) { return aoti_torch_is_defined(handle, to); })) {
    refuse(name, "expected a tensor, got none");
  }
  const auto of = [&](auto get) {
    return ask<int32_t>([&](int32_t* to) { return get(handle, to); });
  };
  if (of(aoti_torch_get_device_type) != aoti_torch_device_type_cpu()) {
    refuse(name, "expected a tensor on the CPU");
  }
  if (of(aoti_torch_get_layout) != aoti_torch_layout_strided()) {
    refuse(name, "expected a dense (strided) tensor");
  }
  const auto size_list = t.sizes();
  rank = int64_t(size_list.size());
  sizes = size_list.data();
  strides = ask<int64_t*>([&](int64_t** to) { return aoti_torch_get_strides(handle, to); });
  type = t.scalar_type();

  const auto number = [&](auto get) {
    return ask<int64_t>([&](int64_t* to) { return get(handle, to); });
  };
  int64_t end = number(aoti_torch_get_storage_offset);  // one past the last element
  bool overflow = __builtin_add_overflow(end, 1, &end);
  for (int64_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0) return;  // nothing that anybody could read
    int64_t step;
    overflow |= __builtin_mul_overflow(sizes[d] - 1, strides[d], &step);
    overflow |= __builtin_add_overflow(end, step, &end);
  }
  overflow |= __builtin_mul_overflow(end, int64_t(t.element_size()), &end);
  const int64_t bytes = number(aoti_torch_get_storage_size);
  if (overflow || end > bytes || !t.const_data_ptr()) {
    refuse(name, "its storage of ", bytes, " bytes does not hold the elements of shape ",
           text(sizes, rank), " and strides ", text(strides, rank), "; was it freed?");
  }
}

void Checked::refuse_rank(int64_t least, int64_t most) const {
  const char* const how = least == most ? "" : "at least ";
  refuse(name, "expected ", how, least, " dims, got shape ", text(sizes, rank));
}
void Checked::refuse_type(const char* want) const {
  refuse(name, "expected dtype ", want, ", got ", torch::headeronly::toString(type));
}
void Checked::refuse_type(ScalarType want) const { refuse_type(torch::headeronly::toString(want)); }
void Checked::refuse_shape(const Checked& other, int64_t count, Sizes tail) const {
  refuse(name, "expected shape ", text(other.sizes, count, tail), ", got ", text(sizes, rank));
}
void Checked::refuse_broadcast(const Checked& other, bool full) const {
  refuse(name, "shape ", text(sizes, rank), " does not broadcast to ",
         text(other.sizes, other.rank), full ? ", dim by dim" : "");
}

void check_dropout(double dropout_p, const std::optional<Tensor>& seed) {
  check_range("dropout_p", dropout_p, 0.0, 1.0);
  if (!seed) {
    if (dropout_p > 0.0) refuse("dropout_seed", "expected one int64 with dropout_p above 0");
    return;
  }
  const Checked s(*seed, "dropout_seed");
  s.typed(ScalarType::Long);
  for (int64_t d = 0; d < s.rank; ++d) {
    if (s.sizes[d] != 1)
      refuse("dropout_seed", "expected one element, got shape ", text(s.sizes, s.rank));
  }
}

void check_wanted(int64_t wanted, int64_t possible) {
  if (wanted & ~possible) {
    refuse("wanted", "bits ", possible, " may be set in this call, got ", wanted);
  }
}

}  // namespace mmkern
