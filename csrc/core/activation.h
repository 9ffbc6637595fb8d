// Activations as functors on F = float or vfloat: value(x), and slope(s), the derivative seen from what backward saves:
// the output where kFromOutput, else the pre-activation. Kinks and NaN follow torch's vector code (in what is left over
// of a vector its elu and hardswish have a slope of 1 at NaN); where torch's derivatives are NaN at infinity (gelu,
// gelu_tanh, mish), these are their limits. Where torch selects between dy and 0 there is gradient(dy, s) in place of
// the slope: an infinite dy, such as sqrt's at 0, ends there.
#pragma once

#include <cstring>

#include "core/math.h"

namespace dlops {

enum class Activation : int32_t {
  kNone,
  kStep,
  kSign,
  kRelu,
  kLeakyRelu,
  kElu,
  kSigmoid,
  kTanh,
  kGelu,
  kGeluTanh,
  kSilu,
  kRelu2,
  kHardswish,
  kMish,
  kSoftplus,
  kCount
};

struct ActivationName {
  const char* name;
  int num_params;
};

// In the order of Activation.
constexpr ActivationName kActivationNames[] = {{"none", 0},       {"step", 0},      {"sign", 0},    {"relu", 0},
                                               {"leaky_relu", 1}, {"elu", 1},       {"sigmoid", 0}, {"tanh", 0},
                                               {"gelu", 0},       {"gelu_tanh", 0}, {"silu", 0},    {"relu2", 0},
                                               {"hardswish", 0},  {"mish", 0},      {"softplus", 2}};

inline namespace DLOPS_ISA {

inline bool parse_activation(const char* name, Activation* activation) {
  for (int i = 0; i < int(Activation::kCount); ++i) {
    if (std::strcmp(name, kActivationNames[i].name)) continue;
    *activation = Activation(i);
    return true;
  }
  return false;
}

struct None {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit None(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return x;
  }
  template <class F>
  DLOPS_HD F slope(F) const {
    return splat<F>(1);
  }
};

struct Step {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit Step(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return vselect(x >= 0, splat<F>(1), splat<F>(0));
  }
  template <class F>
  DLOPS_HD F gradient(F, F) const {
    return splat<F>(0);
  }
};

struct Sign {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit Sign(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {  // 0 for NaN
    return vselect(x > 0, splat<F>(1), vselect(x < 0, splat<F>(-1), splat<F>(0)));
  }
  template <class F>
  DLOPS_HD F gradient(F, F) const {
    return splat<F>(0);
  }
};

struct Relu {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit Relu(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return maximum(x, 0.0f);
  }
  template <class F>
  DLOPS_HD F gradient(F dy, F y) const {
    return vselect(y <= 0, splat<F>(0), dy);
  }
};

struct LeakyRelu {
  static constexpr bool kFromOutput = false;
  float negative_slope;
  DLOPS_HD explicit LeakyRelu(const float* params) : negative_slope(params[0]) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return vselect(x > 0, x, x * negative_slope);
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    return vselect(x > 0, splat<F>(1), splat<F>(negative_slope));
  }
};

struct Elu {
  static constexpr bool kFromOutput = false;
  float alpha;
  DLOPS_HD explicit Elu(const float* params) : alpha(params[0]) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return vselect(x > 0, x, expm1_negative(x) * alpha);
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    return vselect(x > 0, splat<F>(1), exp(x) * alpha);
  }
};

struct Sigmoid {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit Sigmoid(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return sigmoid(x);
  }
  template <class F>
  DLOPS_HD F slope(F y) const {
    return y * (1.0f - y);
  }
};

struct Tanh {
  static constexpr bool kFromOutput = true;
  DLOPS_HD explicit Tanh(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return tanh(x);
  }
  template <class F>
  DLOPS_HD F slope(F y) const {
    return 1.0f - y * y;
  }
};

struct Gelu {
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit Gelu(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return x * normal_cdf(x);
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    const Normal<F> n = normal(x);
    return n.cdf + minimum(maximum(x, -13.0f), 13.0f) * n.bell * 0.39894228f;
  }
};

struct GeluTanh {  // 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit GeluTanh(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return x * sigmoid(x * (x * x * 0.071354816f + 1.5957691f));
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    const F v = minimum(maximum(x, -12.0f), 12.0f);  // the slope is 0 or 1 beyond, and x^3 stays finite
    const F z = v * (v * v * 0.071354816f + 1.5957691f);
    const F e = exp(-absolute(z));
    const F inverse = 1.0f / (e + 1.0f);  // sigmoid(|z|); the other side is e times it, without cancellation
    return vselect(z > 0, inverse, e * inverse) + v * (v * v * 0.21406445f + 1.5957691f) * (e * inverse * inverse);
  }
};

struct Silu {
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit Silu(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return x * sigmoid(x);
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    const F s = sigmoid(x);
    return s * (x * (1.0f - s) + 1.0f);
  }
};

struct Relu2 {
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit Relu2(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    const F y = maximum(x, 0.0f);
    return y * y;
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    return maximum(x, 0.0f) * 2.0f;
  }
};

struct Hardswish {
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit Hardswish(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    return x * minimum(maximum(x + 3.0f, 0.0f), 6.0f) / 6.0f;
  }
  template <class F>
  DLOPS_HD F gradient(F dy, F x) const {
    return vselect(x <= -3, splat<F>(0), vselect(x >= 3, dy, dy * (x / 3.0f + 0.5f)));
  }
};

struct Mish {  // x tanh(softplus(x)) = x w / (w + 2), w = e (e + 2), e = exp(x)
  static constexpr bool kFromOutput = false;
  DLOPS_HD explicit Mish(const float*) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    const F e = exp(minimum(x, 20.0f));  // the quotient is 1 beyond
    const F w = e * (e + 2.0f);
    return x * (w / (w + 2.0f));
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    const F v = minimum(x, 20.0f);
    const F e = exp(v);
    const F w = e * (e + 2.0f);
    const F inverse = 1.0f / (w + 2.0f);
    return w * inverse + v * (e * 4.0f) * (e + 1.0f) * inverse * inverse;
  }
};

struct Softplus {
  static constexpr bool kFromOutput = false;
  float beta, threshold;
  DLOPS_HD explicit Softplus(const float* params) : beta(params[0]), threshold(params[1]) {}
  template <class F>
  DLOPS_HD F value(F x) const {
    const F z = x * beta;
    return vselect(z > threshold, x, softplus(z) / beta);
  }
  template <class F>
  DLOPS_HD F slope(F x) const {
    const F z = x * beta;
    return vselect(z > threshold, splat<F>(1), sigmoid(z));
  }
};

// dy through an activation to what it was taken of; saved is what slope sees.
template <class A, class F>
DLOPS_HD F gradient(const A& activation, F dy, F saved) {
  if constexpr (requires { activation.gradient(dy, saved); })
    return activation.gradient(dy, saved);
  else
    return dy * activation.slope(saved);
}

// Calls f with the functor of an activation chosen at run time.
template <class F>
DLOPS_HD void with_activation(Activation activation, const float* params, F f) {
  switch (activation) {
    case Activation::kNone: return f(None(params));
    case Activation::kStep: return f(Step(params));
    case Activation::kSign: return f(Sign(params));
    case Activation::kRelu: return f(Relu(params));
    case Activation::kLeakyRelu: return f(LeakyRelu(params));
    case Activation::kElu: return f(Elu(params));
    case Activation::kSigmoid: return f(Sigmoid(params));
    case Activation::kTanh: return f(Tanh(params));
    case Activation::kGelu: return f(Gelu(params));
    case Activation::kGeluTanh: return f(GeluTanh(params));
    case Activation::kSilu: return f(Silu(params));
    case Activation::kRelu2: return f(Relu2(params));
    case Activation::kHardswish: return f(Hardswish(params));
    case Activation::kMish: return f(Mish(params));
    case Activation::kSoftplus: return f(Softplus(params));
    case Activation::kCount: return;
  }
}

}  // namespace DLOPS_ISA
}  // namespace dlops
