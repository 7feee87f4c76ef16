// Operators of the "max" mode on CPUs, compiled for the machine on first use: group norm, SiLU and quantize in one
// pass over channels-last memory, and oneDNN's integer kernels without a way through Python.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kRows = 32;  // rows of a piece of work; fixed, so that sums do not depend on the number of threads

// ------------------------------------------------------------------------------------------------ elementwise

inline float widen(float value) { return value; }

inline float widen(c10::BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline c10::BFloat16 narrow(float value) {  // to nearest even; not for NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return c10::BFloat16(static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16), c10::BFloat16::from_bits());
}

// exp by range reduction and a polynomial of degree six: 2 ulp, and plain enough for the compiler to vectorize.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = std::nearbyint(x * 1.44269504088896341f);
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// ------------------------------------------------------------------------------------------------ group norm

template <typename T>
void sums(const T* x, int64_t rows, int64_t channels, float* sum, float* square) {
  std::fill_n(sum, channels, 0.0f);
  std::fill_n(square, channels, 0.0f);
  for (int64_t row = 0; row < rows; ++row, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float value = widen(x[c]);
      sum[c] += value;
      square[c] += value * value;
    }
  }
}

template <typename T, bool silu>
void normalized_codes(const T* x, int64_t rows, int64_t channels, const float* factor, const float* offset,
                      const float* step, float zero_point, float largest, uint8_t* codes) {
  for (int64_t row = 0; row < rows; ++row, x += channels, codes += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      float value = widen(x[c]) * factor[c] + offset[c];
      if (silu) value = value / (1.0f + exponential(-value));
      value = std::nearbyint(value * step[c]) + zero_point;
      codes[c] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(value, 0.0f), largest)));
    }
  }
}

// Statistics of groups out of sums of pieces; a shift of whole channels moves them in closed form.
void fold(const float* pieces, int64_t count, int64_t rows, int64_t channels, int64_t groups, double eps,
          const float* weight, const float* bias, const float* shift, float* factor, float* offset) {
  const int64_t width = channels / groups;
  const double numbers = static_cast<double>(rows) * width;
  for (int64_t g = 0; g < groups; ++g) {
    double total = 0, squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      double sum = 0, square = 0;
      for (int64_t piece = 0; piece < count; ++piece) {
        sum += pieces[2 * piece * channels + c];
        square += pieces[(2 * piece + 1) * channels + c];
      }
      const double by = shift == nullptr ? 0.0 : shift[c];
      total += sum + rows * by;
      squares += square + 2 * by * sum + rows * by * by;
    }
    const double mean = total / numbers;
    const double variance = std::max(squares / numbers - mean * mean, 0.0);
    const double inverse = 1.0 / std::sqrt(variance + eps);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double by = shift == nullptr ? 0.0 : shift[c];
      const double slope = inverse * (weight == nullptr ? 1.0 : weight[c]);
      factor[c] = static_cast<float>(slope);
      offset[c] = static_cast<float>((by - mean) * slope + (bias == nullptr ? 0.0 : bias[c]));
    }
  }
}

const float* numbers_of(const optional<Tensor>& tensor, Tensor& kept) {
  if (!tensor.has_value()) return nullptr;
  kept = tensor->to(at::kFloat).contiguous();
  return kept.data_ptr<float>();
}

// One number for all of `count`, or one for each: what is read by index must be there.
void check_count(const char* what, const Tensor& numbers, int64_t count, bool or_one = false) {
  TORCH_CHECK_VALUE(numbers.numel() == count || (or_one && numbers.numel() == 1), what, " takes ", count, " numbers",
                    or_one ? ", or one" : "", ", got ", numbers.sizes());
}

// Where the pixels of one sample lie among padded codes.
struct Frame {
  int64_t height, width, above, beside;

  int64_t lines() const { return height + 2 * above; }
  int64_t columns() const { return width + 2 * beside; }
  int64_t place(int64_t pixel) const { return (pixel / width + above) * columns() + pixel % width + beside; }

  // `value` on the pixels of line `y` that are padding.
  void fill(uint8_t* codes, int64_t y, int64_t channels, uint8_t value) const {
    uint8_t* line = codes + y * columns() * channels;
    if (y < above || y >= above + height) {
      std::memset(line, value, columns() * channels);
      return;
    }
    std::memset(line, value, beside * channels);
    std::memset(line + (beside + width) * channels, value, beside * channels);
  }
};

// Every line of every padded sample, in parallel: work(sample, line).
template <typename Work>
void each_line(int64_t batch, const Frame& frame, int64_t channels, Work work) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, frame.columns() * channels));
  at::parallel_for(0, batch * frame.lines(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i / frame.lines(), i % frame.lines());
  });
}

struct Norm {
  int64_t groups;
  double eps;
  const float *weight, *bias, *shift;
  bool silu;
};

struct Codes {
  const float* steps;  // reciprocals, [1 or B, C]
  int64_t step_stride;
  std::vector<float> zero_points;
  float largest;
  uint8_t* data;
};

template <typename T>
void run(const T* x, int64_t batch, int64_t channels, const Frame& frame, const Norm& norm, const Codes& out) {
  const int64_t rows = frame.height * frame.width, pieces = (rows + kRows - 1) / kRows, stride = rows * channels;
  const int64_t out_stride = frame.lines() * frame.columns() * channels;
  std::vector<float> partial(batch * pieces * 2 * channels), factor(batch * channels), bias(batch * channels);
  const auto zero_point = [&](int64_t b) { return out.zero_points[b % out.zero_points.size()]; };
  const auto each = [&](auto&& work) {  // work(sample, piece, first row, rows)
    const int64_t grain = std::max<int64_t>(1, 8192 / (kRows * channels));
    at::parallel_for(0, batch * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % pieces * kRows;
        work(i / pieces, i, first, std::min(kRows, rows - first));
      }
    });
  };
  each([&](int64_t b, int64_t i, int64_t first, int64_t count) {
    float* sum = partial.data() + 2 * i * channels;
    sums(x + b * stride + first * channels, count, channels, sum, sum + channels);
  });
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      fold(partial.data() + 2 * b * pieces * channels, pieces, rows, channels, norm.groups, norm.eps, norm.weight,
           norm.bias, norm.shift == nullptr ? nullptr : norm.shift + b * channels, factor.data() + b * channels,
           bias.data() + b * channels);
    }
  });
  each([&](int64_t b, int64_t, int64_t first, int64_t count) {
    const auto work = norm.silu ? normalized_codes<T, true> : normalized_codes<T, false>;
    for (int64_t pixel = first, run = 0; pixel < first + count; pixel += run) {  // up to the end of each line
      run = std::min(first + count - pixel, frame.width - pixel % frame.width);
      work(x + b * stride + pixel * channels, run, channels, factor.data() + b * channels, bias.data() + b * channels,
           out.steps + b * out.step_stride, zero_point(b), out.largest,
           out.data + b * out_stride + frame.place(pixel) * channels);
    }
  });
  if (frame.above == 0 && frame.beside == 0) return;
  each_line(batch, frame, channels, [&](int64_t b, int64_t y) {
    frame.fill(out.data + b * out_stride, y, channels, static_cast<uint8_t>(zero_point(b)));
  });
}

// 1 / (scale * channel_scale), [1 or B, C], of a scale [1 or B] and a channel_scale of none, [C] or [B, C].
std::vector<float> reciprocals(const Tensor& scale, const optional<Tensor>& channel_scale, int64_t channels,
                               int64_t batch) {
  check_count("a scale", scale, batch, true);
  if (channel_scale.has_value()) {
    check_count("a channel_scale", *channel_scale, channel_scale->dim() == 2 ? batch * channels : channels);
  }
  Tensor kept[2];
  const float* scales = numbers_of(scale, kept[0]);
  const float* factors = numbers_of(channel_scale, kept[1]);
  const int64_t factor_rows = factors == nullptr ? 1 : kept[1].numel() / channels;
  const int64_t rows = std::max(scale.numel(), factor_rows);
  std::vector<float> result(rows * channels);
  for (int64_t row = 0; row < rows; ++row) {
    const float step = scales[scale.numel() == 1 ? 0 : row];
    const float* factor = factors == nullptr ? nullptr : factors + (factor_rows == 1 ? 0 : row) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      result[row * channels + c] = 1.0f / (factor == nullptr ? step : step * factor[c]);
    }
  }
  return result;
}

// Codes of group_norm(x + shift), with SiLU if asked, and `padding` rows and columns of the zero point around.
// x is [B, C, ...]; the codes are laid out channels-last.
Tensor group_norm_quantize(const Tensor& given, const optional<Tensor>& shift, int64_t groups,
                           const optional<Tensor>& weight, const optional<Tensor>& bias, double eps, bool silu,
                           const Tensor& scale, const Tensor& zero_point, const optional<Tensor>& channel_scale,
                           int64_t quant_max, at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(given.dim() == 3 || given.dim() == 4, "group_norm_quantize takes [B, C, L] or [B, C, H, W], got ",
                    given.sizes());
  const Tensor x = given.movedim(1, -1).contiguous();
  const int64_t batch = x.size(0), channels = x.size(-1);
  const Frame frame{x.dim() == 4 ? x.size(1) : 1, x.size(-2), padding[0], padding[1]};
  auto sizes = x.sizes().vec();
  sizes[sizes.size() - 2] = frame.columns();
  if (x.dim() == 4) sizes[1] = frame.lines();
  Tensor codes = at::empty(sizes, x.options().dtype(at::kByte));
  Tensor kept[3];
  optional<Tensor> shifts;
  if (shift.has_value()) shifts = shift->expand({batch, channels});
  TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0, "group_norm_quantize takes groups that divide ", channels,
                    " channels, got ", groups);
  if (weight.has_value()) check_count("a norm's weight", *weight, channels);
  if (bias.has_value()) check_count("a norm's bias", *bias, channels);
  check_count("a zero point", zero_point, batch, true);
  const Norm norm{groups, eps, numbers_of(weight, kept[0]), numbers_of(bias, kept[1]), numbers_of(shifts, kept[2]),
                  silu};
  const std::vector<float> steps = reciprocals(scale, channel_scale, channels, batch);
  const Tensor zeros = zero_point.to(at::kInt).contiguous();
  const int32_t* zero = zeros.data_ptr<int32_t>();
  const Codes out{steps.data(), static_cast<int64_t>(steps.size()) == channels ? 0 : channels,
                  std::vector<float>(zero, zero + zeros.numel()), static_cast<float>(quant_max),
                  codes.data_ptr<uint8_t>()};
  if (x.scalar_type() == at::kBFloat16) {
    run(x.data_ptr<c10::BFloat16>(), batch, channels, frame, norm, out);
  } else {
    const Tensor wide = x.to(at::kFloat);
    run(wide.data_ptr<float>(), batch, channels, frame, norm, out);
  }
  return codes.movedim(-1, 1);
}

// ------------------------------------------------------------------------------------------------ GELU

// x Phi(x) by its tanh formula, or by erf (Abramowitz and Stegun, 7.1.26: to 1.5e-7).
template <bool tanh>
inline float gelu(float x) {
  if (tanh) {
    constexpr float kScale = 1.5957691216057308f;  // 2 sqrt(2 / pi): (1 + tanh(u)) / 2 is sigmoid(2 u)
    return x / (1.0f + exponential(-kScale * (x + 0.044715f * x * x * x)));
  }
  const float t = 1.0f / std::fma(0.3275911f * 0.70710678f, std::abs(x), 1.0f);
  float p = 1.061405429f;
  p = std::fma(p, t, -1.453152027f);
  p = std::fma(p, t, 1.421413741f);
  p = std::fma(p, t, -0.284496736f);
  p = std::fma(p, t, 0.254829592f);
  const float tail = 0.5f * p * t * exponential(-0.5f * x * x);  // 1 - Phi(|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Rows of channels, each row `line` numbers after the one before.
template <typename T>
struct Lines {
  const T* data;
  int64_t line;
  const T* at(int64_t row) const { return data + row * line; }
};

template <typename T, bool tanh, bool gated>
void gelu_codes(Lines<T> x, Lines<T> factor, int64_t first, int64_t rows, int64_t channels, const float* step,
                float zero_point, float largest, uint8_t* codes) {
  for (int64_t row = first; row < first + rows; ++row, codes += channels) {
    const T* from = x.at(row);
    const T* times = gated ? factor.at(row) : nullptr;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      float value = gelu<tanh>(widen(from[c]));
      if (gated) value *= widen(times[c]);
      value = std::nearbyint(value * step[c]) + zero_point;
      codes[c] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(value, 0.0f), largest)));
    }
  }
}

// The rows of x [B, ..., C], which may be a slice of its last axis; kept alive by `kept`.
template <typename T>
Lines<T> lines_of(const Tensor& x, Tensor& kept) {
  kept = x.to(c10::CppTypeToScalarType<T>::value);
  bool even = kept.stride(-1) == 1;  // every row at the same distance from the last
  for (int64_t axis = 0; axis + 2 < kept.dim(); ++axis) {
    even = even && kept.stride(axis) == kept.stride(axis + 1) * kept.size(axis + 1);
  }
  if (!even) kept = kept.contiguous();
  return {kept.data_ptr<T>(), kept.stride(-2)};
}

// Codes of gelu(x), times `factor` if there is one, both [B, ..., C] with channels last.
Tensor gelu_quantize(const Tensor& given, const optional<Tensor>& factor, bool tanh, const Tensor& scale,
                     const Tensor& zero_point, const optional<Tensor>& channel_scale, int64_t quant_max) {
  TORCH_CHECK_VALUE(given.dim() >= 2 && (!factor.has_value() || factor->sizes() == given.sizes()),
                    "gelu_quantize takes x [B, ..., C] and a factor of its shape, got ", given.sizes());
  const int64_t channels = given.size(-1), batch = given.size(0);
  const int64_t rows = given.numel() / std::max<int64_t>(1, channels), per_sample = rows / std::max<int64_t>(1, batch);
  Tensor codes = at::empty(given.sizes(), given.options().dtype(at::kByte));
  check_count("a zero point", zero_point, batch, true);
  const std::vector<float> steps = reciprocals(scale, channel_scale, channels, batch);
  const int64_t stride = static_cast<int64_t>(steps.size()) == channels ? 0 : channels;
  const Tensor zeros = zero_point.to(at::kInt).contiguous();
  const int32_t* zero = zeros.data_ptr<int32_t>();
  const int64_t count = zeros.numel();
  const auto go = [&](auto type, auto by_tanh, auto gated) {
    using T = decltype(type);
    Tensor kept[2];
    const Lines<T> x = lines_of<T>(given, kept[0]);
    const Lines<T> times = gated ? lines_of<T>(*factor, kept[1]) : x;
    const int64_t piece = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, channels));
    at::parallel_for(0, rows, piece, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin, run = 0; row < end; row += run) {  // up to the end of each sample
        const int64_t b = row / per_sample;
        run = std::min(end, (b + 1) * per_sample) - row;
        gelu_codes<T, by_tanh, gated>(x, times, row, run, channels, steps.data() + b * stride,
                                      static_cast<float>(zero[b % count]), static_cast<float>(quant_max),
                                      codes.data_ptr<uint8_t>() + row * channels);
      }
    });
  };
  const auto pick = [&](auto type) {
    const bool gated = factor.has_value();
    if (tanh) return gated ? go(type, std::true_type(), std::true_type()) : go(type, std::true_type(), std::false_type());
    gated ? go(type, std::false_type(), std::true_type()) : go(type, std::false_type(), std::false_type());
  };
  given.scalar_type() == at::kBFloat16 ? pick(c10::BFloat16(0.0f)) : pick(0.0f);
  return codes;
}

// ------------------------------------------------------------------------------------------------ attention

constexpr int64_t kLanes = 16;
constexpr float kNever = -1e30f;  // a score whose share is next to nothing, and still is when it is scaled
constexpr int64_t kQueries = 64, kKeys = 512;  // a tile of scores, 128 KiB, stays in the second-level cache

// Keys of one head, [n, d], as brgemm wants its right-hand side [d, n]: pairs of d side by side.
void pack_keys(const c10::BFloat16* k, int64_t stride, int64_t n, int64_t d, c10::BFloat16* packed) {
  for (int64_t i = 0; i < n; ++i, k += stride) {
    for (int64_t pair = 0; pair < d / 2; ++pair) std::memcpy(packed + 2 * (pair * n + i), k + 2 * pair, 4);
  }
}

// Values of one head, [n, d]: pairs of n side by side; an odd last row is paired with zeros.
void pack_values(const c10::BFloat16* v, int64_t stride, int64_t n, int64_t d, c10::BFloat16* packed) {
  const c10::BFloat16 zero(0.0f);
  for (int64_t i = 0; i < n; i += 2, packed += 2 * d) {
    for (int64_t c = 0; c < d; ++c) {
      packed[2 * c] = v[i * stride + c];
      packed[2 * c + 1] = i + 1 < n ? v[(i + 1) * stride + c] : zero;
    }
  }
}

// 2^y for y from -126 to about 0, to 1e-4: it is rounded to bfloat16 next.
inline float power_of_two(float y) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = y + kMagic;
  const float f = y - (shifted - kMagic);
  float p = std::fma(5.517164431e-2f, f, 2.426111203e-1f);
  p = std::fma(p, f, 6.932609900e-1f);
  p = std::fma(p, f, 9.999280738e-1f);
  uint32_t bits, whole;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&whole, &shifted, sizeof(whole));
  bits += whole << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// The largest of n numbers, n a multiple of kLanes; compilers do not vectorize a maximum by themselves.
float largest(const float* x, int64_t n) {
  float lanes[kLanes];
  std::copy_n(x, kLanes, lanes);
  for (int64_t i = kLanes; i < n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

// One row of scores to probabilities, up to a factor; returns the new maximum and adds to `total`. `scale` and the
// maximum are in powers of two.
float softmax_row(const float* scores, int64_t n, float scale, float before, float& total, uint16_t* out) {
  const float most = std::max(before, largest(scores, n) * scale);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float p = power_of_two(std::max(std::fma(scores[i], scale, -most), -126.0f));
    sum += p;
    uint32_t bits;
    std::memcpy(&bits, &p, sizeof(bits));
    out[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);  // to nearest, ties up: p is not negative
  }
  total += sum;
  return most;
}

// softmax(q k^T scale) v in bfloat16 with float32 sums, a tile of scores at a time (Dao et al., arXiv 2205.14135).
// q [B, H, N, D], k and v [B, H, M, D], D even. PyTorch's own goes through float32 gemms on CPUs without AMX.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const auto dense = [](const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); };
  // As PyTorch's own: one batch or head of keys serves all queries.
  const auto for_all = [&](const Tensor& x) { return x.expand({query.size(0), query.size(1), -1, -1}); };
  const Tensor q = dense(query), k = dense(for_all(key)), v = dense(for_all(value));
  const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2), d = q.size(3), m = k.size(2);
  TORCH_CHECK_VALUE(scale > 0, "attention takes a scale above zero, got ", scale);
  TORCH_CHECK_VALUE(d % 2 == 0 && k.size(3) == d && v.size(3) == d && v.size(2) == m && m > 0,
                    "attention takes q [B, H, N, D], k and v [B, H, M, D] with an even D, got ", q.sizes(), k.sizes(),
                    v.sizes());
  using Half = c10::BFloat16;
  Tensor out = at::empty({batch, n, heads, d}, q.options());
  const int64_t width = std::min(kKeys, (m + 1) / 2 * 2), blocks = (m + width - 1) / width;
  const int64_t even = width * d;  // numbers of a packed block
  Tensor packed = at::empty({batch * heads, 2, blocks, even}, q.options());
  const auto head = [&](const Tensor& x, int64_t i) {
    return x.data_ptr<Half>() + i / heads * x.stride(0) + i % heads * x.stride(1);
  };
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * width, count = std::min(width, m - first);
      Half* to = packed.data_ptr<Half>() + (i / blocks * 2 * blocks + i % blocks) * even;
      pack_keys(head(k, i / blocks) + first * k.stride(2), k.stride(2), count, d, to);
      pack_values(head(v, i / blocks) + first * v.stride(2), v.stride(2), count, d, to + blocks * even);
    }
  });
  const int64_t tiles = (n + kQueries - 1) / kQueries;
  const float scale2 = static_cast<float>(scale * 1.4426950408889634);  // e^x = 2^(x log2 e)
  const int64_t line = (width + kLanes - 1) / kLanes * kLanes;  // whole vectors: the rest of a row counts as never
  at::parallel_for(0, batch * heads * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(kQueries * line), sums(kQueries * d);
    std::vector<Half> shares(kQueries * line);
    float most[kQueries], total[kQueries];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kQueries, rows = std::min(kQueries, n - first);
      const Half* here = head(q, i / tiles) + first * q.stride(2);
      const Half* keys = packed.data_ptr<Half>() + i / tiles * 2 * blocks * even;
      std::fill_n(most, rows, -std::numeric_limits<float>::infinity());
      std::fill_n(total, rows, 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = std::min(width, m - block * width);
        at::native::cpublas::brgemm(rows, count, d, q.stride(2), count, line, false, here, keys + block * even,
                                    scores.data());
        for (int64_t row = 0; row < rows; ++row) {
          const float before = most[row];
          float added = 0.0f;
          std::fill(scores.data() + row * line + count, scores.data() + (row + 1) * line, kNever);
          most[row] = softmax_row(scores.data() + row * line, line, scale2, before, added,
                                  reinterpret_cast<uint16_t*>(shares.data() + row * line));
          const float fade = block == 0 ? 0.0f : std::exp2(before - most[row]);
          total[row] = total[row] * fade + added;
          if (block > 0 && fade != 1.0f) {
            for (int64_t c = 0; c < d; ++c) sums[row * d + c] *= fade;
          }
        }
        at::native::cpublas::brgemm(rows, d, (count + 1) / 2 * 2, line, d, d, block > 0, shares.data(),
                                    keys + (blocks + block) * even, sums.data());
      }
      for (int64_t row = 0; row < rows; ++row) {
        Half* to = out.data_ptr<Half>() + ((i / tiles / heads * n + first + row) * heads + i / tiles % heads) * d;
        const float whole = 1.0f / total[row];
        for (int64_t c = 0; c < d; ++c) to[c] = narrow(sums[row * d + c] * whole);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return out.transpose(1, 2);
}

// ------------------------------------------------------------------------------------------------ few float rows

constexpr int64_t kFewRows = 16;  // beyond, a blocked gemm is faster

// Outputs `begin` to `end` of R rows at once, so that every weight is read once: y[r, o] = x[r] w[o] + bias[o].
template <int R>
void few_rows(const float* x, const float* weight, const float* bias, int64_t inputs, int64_t outputs, int64_t begin,
              int64_t end, float* y) {
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t o = begin; o < end; ++o) {
    const float* w = weight + o * inputs;
    float sums[R][kLanes] = {};
    for (int64_t k = 0; k < whole; k += kLanes) {
      for (int r = 0; r < R; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < kLanes; ++j) sums[r][j] += w[k + j] * x[r * inputs + k + j];
      }
    }
    for (int r = 0; r < R; ++r) {
      float sum = bias == nullptr ? 0.0f : bias[o];
      for (int64_t k = whole; k < inputs; ++k) sum += w[k] * x[r * inputs + k];
      for (int64_t j = 0; j < kLanes; ++j) sum += sums[r][j];
      y[r * outputs + o] = sum;
    }
  }
}

// x [B, K] times weight [N, K] plus bias [N] in float32. Few rows are bound by reading the weight, which a gemm would
// first copy into blocks.
Tensor float_linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  const bool plain = x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
                     (!bias.has_value() || bias->numel() == outputs);
  if (!plain || rows > kFewRows) return at::linear(x, weight, bias);
  TORCH_CHECK_VALUE(weight.size(1) == inputs, "float_linear takes x [B, K] and weight [N, K], got ", x.sizes(), " and ",
                    weight.sizes());
  const Tensor dense = x.contiguous();
  Tensor kept, result = at::empty({rows, outputs}, x.options());
  const float *from = dense.data_ptr<float>(), *w = weight.data_ptr<float>(), *added = numbers_of(bias, kept);
  float* to = result.data_ptr<float>();
  at::parallel_for(0, outputs, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, inputs)), [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows;) {
      const float* here = from + row * inputs;
      float* out = to + row * outputs;
      if (rows - row >= 4) {
        few_rows<4>(here, w, added, inputs, outputs, begin, end, out);
        row += 4;
      } else {
        few_rows<1>(here, w, added, inputs, outputs, begin, end, out);
        row += 1;
      }
    }
  });
  return result;
}

// ------------------------------------------------------------------------------------------------ integer kernels

// Runs `kernel` with one scale and zero point; rows of other timesteps go in calls of their own.
template <typename Kernel>
Tensor by_rows(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, Kernel kernel) {
  const Tensor scales = scale.to(at::kFloat).contiguous(), zeros = zero_point.to(at::kInt).contiguous();
  const float* s = scales.data_ptr<float>();
  const int32_t* z = zeros.data_ptr<int32_t>();
  const int64_t count = scales.numel();
  check_count("a scale", scales, codes.size(0), true);
  check_count("a zero point", zeros, count);
  bool same = true;
  for (int64_t i = 1; i < count; ++i) same = same && s[i] == s[0] && z[i] == z[0];
  if (same) return kernel(codes, s[0], z[0]);
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < count; ++i) parts.push_back(kernel(codes.narrow(0, i, 1), s[i], z[i]));
  return at::cat(parts);
}

// What is left of the bias once the zero point is off every code: oneDNN's own way costs up to half the time.
Tensor offset(double shift, const Tensor& weight_sum, const optional<Tensor>& bias) {
  if (bias.has_value()) check_count("a bias", *bias, weight_sum.numel());
  Tensor result = at::empty_like(weight_sum);
  Tensor kept;
  const float* added = numbers_of(bias, kept);
  const float* sum = weight_sum.data_ptr<float>();
  float* out = result.data_ptr<float>();
  const float by = static_cast<float>(shift);
  for (int64_t i = 0; i < weight_sum.numel(); ++i) out[i] = (added == nullptr ? 0.0f : added[i]) - by * sum[i];
  return result;
}

// Channels-last codes [B, C, H, W] with `around` rows and columns of `value` on each side.
Tensor padded(const Tensor& codes, at::IntArrayRef around, uint8_t value) {
  const Tensor rows = codes.permute({0, 2, 3, 1}).contiguous();
  const int64_t channels = rows.size(3), line = rows.size(2) * channels;
  const Frame frame{rows.size(1), rows.size(2), around[0], around[1]};
  Tensor result = at::empty({rows.size(0), frame.lines(), frame.columns(), channels}, rows.options());
  const uint8_t* from = rows.data_ptr<uint8_t>();
  uint8_t* to = result.data_ptr<uint8_t>();
  each_line(rows.size(0), frame, channels, [&](int64_t b, int64_t y) {
    uint8_t* sample = to + b * frame.lines() * frame.columns() * channels;
    frame.fill(sample, y, channels, value);
    const int64_t inner = y - frame.above;
    if (inner < 0 || inner >= frame.height) return;
    std::memcpy(sample + frame.place(inner * frame.width) * channels, from + (b * frame.height + inner) * line, line);
  });
  return result.permute({0, 3, 1, 2});
}

using Scalars = torch::List<optional<at::Scalar>>;
using Sizes = torch::List<int64_t>;

// A weight as oneDNN wants it; one that comes as plain codes is prepacked for this call.
Tensor prepacked(const Tensor& weight, const Tensor& weight_scale, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation, int64_t groups) {
  using Op = Tensor(Tensor, Tensor, double, int64_t, Sizes, Sizes, Sizes, int64_t, optional<Sizes>);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("onednn::qconv_prepack", "").typed<Op>();
  if (weight.is_mkldnn()) return weight;
  return op.call(weight, weight_scale, 1.0, 0, Sizes(stride), Sizes(padding), Sizes(dilation), groups, {});
}

Tensor prepacked(const Tensor& weight) {
  using Op = Tensor(Tensor, optional<Sizes>);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("onednn::qlinear_prepack", "").typed<Op>();
  return weight.is_mkldnn() ? weight : op.call(weight, {});
}

Tensor conv(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, const Tensor& weight,
            const Tensor& weight_scale, const Tensor& weight_sum, const optional<Tensor>& bias, at::IntArrayRef stride,
            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, at::IntArrayRef /*kernel_size*/,
            at::ScalarType dtype) {
  using Op = Tensor(Tensor, double, int64_t, Tensor, Tensor, Tensor, optional<Tensor>, Sizes, Sizes, Sizes, int64_t,
                    double, int64_t, optional<at::ScalarType>, std::string_view, Scalars,
                    optional<std::string_view>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("onednn::qconv_pointwise", "").typed<Op>();
  const Tensor packed = prepacked(weight, weight_scale, stride, padding, dilation, groups);
  const Tensor weight_zero_point = at::zeros(weight_scale.sizes(), weight_scale.options().dtype(at::kInt));
  return by_rows(codes, scale, zero_point, [&](const Tensor& part, double s, int64_t z) {
    const bool around = z != 0 && (padding[0] != 0 || padding[1] != 0);
    const int64_t none[] = {0, 0};
    return op.call(around ? padded(part, padding, static_cast<uint8_t>(z)) : part, s, 0, packed, weight_scale,
                   weight_zero_point, offset(s * z, weight_sum, bias), Sizes(stride),
                   Sizes(around ? at::IntArrayRef(none) : padding), Sizes(dilation), groups, 1.0, 0, dtype, "none",
                   Scalars(), "");
  });
}

Tensor linear(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, const Tensor& weight,
              const Tensor& weight_scale, const Tensor& weight_sum, const optional<Tensor>& bias,
              at::ScalarType dtype) {
  using Op = Tensor(Tensor, double, int64_t, Tensor, Tensor, Tensor, optional<Tensor>, double, int64_t,
                    optional<at::ScalarType>, std::string_view, Scalars, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("onednn::qlinear_pointwise", "").typed<Op>();
  const Tensor packed = prepacked(weight);
  const Tensor weight_zero_point = at::zeros(weight_scale.sizes(), weight_scale.options().dtype(at::kInt));
  const auto multiply = [&](const Tensor& part, double s, const optional<Tensor>& added, at::ScalarType out) {
    return op.call(part, s, 0, packed, weight_scale, weight_zero_point, added, 1.0, 0, out, "none", Scalars(), "");
  };
  if (codes.dim() > 2 || scale.numel() == 1) {
    return by_rows(codes, scale, zero_point, [&](const Tensor& part, double s, int64_t z) {
      return multiply(part, s, offset(s * z, weight_sum, bias), dtype);
    });
  }
  // Vectors: a call for each would read the whole weight for one product a row.
  const Tensor result = multiply(codes, 1.0, {}, at::kFloat)
                            .sub_(zero_point.unsqueeze(1) * weight_sum)
                            .mul_(scale.unsqueeze(1));
  return (bias.has_value() ? result.add_(*bias) : result).to(dtype);
}

// Vectors [B, K] whose codes are two bytes, `ratio * (high - zero_high) + low - zero_low`: the weight is read once.
Tensor two_byte_linear(const Tensor& high, const Tensor& low, const Tensor& scale, const Tensor& zero_high,
                       const Tensor& zero_low, const Tensor& weight, const Tensor& weight_scale,
                       const Tensor& weight_sum, const optional<Tensor>& bias, double ratio) {
  const Tensor nothing = at::zeros({1}, scale.options().dtype(at::kInt)), one = at::ones({1}, scale.options());
  const Tensor products = linear(at::cat({high, low}), one, nothing, weight, weight_scale, weight_sum, {}, at::kFloat);
  const Tensor scales = scale.to(at::kFloat).contiguous();
  const Tensor high_zeros = zero_high.to(at::kInt).contiguous(), low_zeros = zero_low.to(at::kInt).contiguous();
  const int64_t rows = high.size(0), outputs = products.size(1), single = scales.numel() == 1;
  check_count("a scale", scales, rows, true);
  check_count("a zero point", high_zeros, scales.numel());
  check_count("a zero point", low_zeros, scales.numel());
  if (bias.has_value()) check_count("a bias", *bias, outputs);
  Tensor kept, result = at::empty({rows, outputs}, products.options());
  const float *both = products.data_ptr<float>(), *sums = weight_sum.data_ptr<float>(), *added = numbers_of(bias, kept);
  const float by = static_cast<float>(ratio);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = single ? 0 : row;
    const float s = scales.data_ptr<float>()[place];
    const float zero = by * high_zeros.data_ptr<int32_t>()[place] + low_zeros.data_ptr<int32_t>()[place];
    const float *upper = both + row * outputs, *lower = both + (rows + row) * outputs;
    float* out = result.data_ptr<float>() + row * outputs;
    for (int64_t i = 0; i < outputs; ++i) {
      out[i] = s * (by * upper[i] + lower[i] - zero * sums[i]) + (added == nullptr ? 0.0f : added[i]);
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(dmq_ao_cpu, m) {
  m.def(
      "group_norm_quantize(Tensor x, Tensor? shift, int groups, Tensor? weight, Tensor? bias, float eps, bool silu,"
      " Tensor scale, Tensor zero_point, Tensor? channel_scale, int quant_max, int[] padding) -> Tensor");
  m.def("float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "gelu_quantize(Tensor x, Tensor? factor, bool tanh, Tensor scale, Tensor zero_point, Tensor? channel_scale,"
      " int quant_max) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, float scale) -> Tensor");
  m.def(
      "conv(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
      " Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
      " int[] kernel_size, ScalarType dtype) -> Tensor");
  m.def(
      "linear(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
      " Tensor? bias, ScalarType dtype) -> Tensor");
  m.def(
      "two_byte_linear(Tensor high, Tensor low, Tensor scale, Tensor zero_high, Tensor zero_low, Tensor weight,"
      " Tensor weight_scale, Tensor weight_sum, Tensor? bias, float ratio) -> Tensor");
}

TORCH_LIBRARY_IMPL(dmq_ao_cpu, CompositeExplicitAutograd, m) {
  m.impl("group_norm_quantize", group_norm_quantize);
  m.impl("float_linear", float_linear);
  m.impl("gelu_quantize", gelu_quantize);
  m.impl("attention", attention);
  m.impl("conv", conv);
  m.impl("linear", linear);
  m.impl("two_byte_linear", two_byte_linear);
}
