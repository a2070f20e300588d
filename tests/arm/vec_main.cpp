// tests/vec_probe.cpp as a program, for an emulator: arguments name a function and its counts, its
// input comes through stdin and its output goes to stdout. tests/arm/emulated.py calls it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../vec_probe.cpp"

namespace {

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, stdin) != count) exit(2);
  return values;
}

// One element more than is asked for, which must be left alone.
template <class T>
void write(const std::vector<T>& values, T guard) {
  if (memcmp(&values.back(), &guard, sizeof(T)) != 0) exit(3);
  fwrite(values.data(), sizeof(T), values.size() - 1, stdout);
}

template <class From, class To>
void convert(void (*f)(const void*, void*, long), long n) {
  const std::vector<From> x = read<From>(n);
  std::vector<To> out(n + 1, To(7));
  f(x.data(), out.data(), n);
  write(out, To(7));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return printf("%d\n", lanes()), 0;
  const auto is = [argv](const char* name) { return strcmp(argv[1], name) == 0; };
  const long n = atol(argv[2]);
  if (is("f16_to_f32")) return convert<uint16_t, float>(f16_to_f32, n), 0;
  if (is("bf16_to_f32")) return convert<uint16_t, float>(bf16_to_f32, n), 0;
  if (is("f32_to_f16")) return convert<float, uint16_t>(f32_to_f16, n), 0;
  if (is("f32_to_bf16")) return convert<float, uint16_t>(f32_to_bf16, n), 0;
  if (is("reduce")) {
    const auto x = read<float>(lanes());
    const auto flags = read<uint8_t>(lanes());
    std::vector<float> out(5, 7.0f);
    reduce(x.data(), flags.data(), int(n), out.data());
    return write(out, 7.0f), 0;
  }
  const auto x = read<float>(n), y = read<float>(n), z = read<float>(n);
  std::vector<float> out(n + 1, 7.0f);
  if (apply(argv[1], x.data(), y.data(), z.data(), out.data(), n)) return 1;
  return write(out, 7.0f), 0;
}
