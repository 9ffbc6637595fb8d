// From what every chunk of a selective scan does to a state from zero to what comes into it, along the chunks: a thread
// takes one state of one channel, and adjacent threads adjacent states.
#include "cuda/scan_tile.h"

namespace dlops::cuda {
namespace {

// values (batch, chunks, dim, states): in, what a chunk leaves of a zero state; out, what the chunks before
// (kBackwards: after) leave. Nothing passes through a chunk in which a sequence begins (ends).
template <bool kBackwards>
__global__ void __launch_bounds__(kScanThreads) scan_chunks_kernel(Scan p, const float* totals, float* values) {
  const int64_t size = p.dim * p.states, i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= p.batch * size) return;
  const int64_t batch = i / size, state = i % size, channel = state / p.states;
  const int64_t chunks = p.chunks();
  const float a = p.A[state];
  float carried = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t chunk = kBackwards ? chunks - 1 - k : k, begin = chunk * p.chunk;
    const int64_t end = begin + p.chunk < p.steps ? begin + p.chunk : p.steps;
    float& value = values[(batch * chunks + chunk) * size + state];
    const float alone = value;
    value = carried;
    const bool passes =
        kBackwards ? ScanSequence(p, batch, begin).end > end : ScanSequence(p, batch, end - 1).begin < begin;
    carried = passes ? expf(totals[(batch * chunks + chunk) * p.dim + channel] * a) * carried + alone : alone;
  }
}

}  // namespace

const char* scan_chunks(const Scan& p, const float* totals, float* values, bool backwards, void* stream) {
  const int64_t threads = p.batch * p.dim * p.states;
  if (threads == 0) return nullptr;
  const auto kernel = backwards ? scan_chunks_kernel<true> : scan_chunks_kernel<false>;
  DLOPS_LAUNCH(kernel, dim3(unsigned(ceil_div(threads, kScanThreads))), dim3(kScanThreads), 0,
               static_cast<cudaStream_t>(stream), p, totals, values);
  return launch_error();
}

}  // namespace dlops::cuda
