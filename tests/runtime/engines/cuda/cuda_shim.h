// Enough of CUDA's C++ for a host compiler to build our .cu files and run them on the CPU. Force-included before them.
//
// Blocks run in turn. A cooperative kernel (one that shares memory or synchronizes) runs every CUDA thread of a block as
// an OS thread, so that a missing barrier is a data race a sanitizer can see; any other kernel runs as a plain loop.
// Every thread of a warp must take part in its shuffles, and shuffled values are at most 8 bytes.
#pragma once

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

namespace shim {

constexpr unsigned WARP = 32;

struct Warp {
    explicit Warp(unsigned lanes) : lanes(lanes), barrier(lanes) {}
    unsigned lanes;
    std::barrier<> barrier;
    uint64_t values[WARP];
};

// What the threads of the running block share.
struct Block {
    explicit Block(unsigned threads) : barrier(threads) {
        for (unsigned first = 0; first < threads; first += WARP) warps.emplace_back(std::min(WARP, threads - first));
    }
    std::barrier<> barrier;
    std::deque<Warp> warps;
};

inline std::optional<Block> block;

inline Block& running_block() {
    if (!block) std::abort();  // host.py took a cooperative kernel for a plain one
    return *block;
}

inline Warp& warp() { return running_block().warps[threadIdx.x / WARP]; }

inline unsigned lane() { return threadIdx.x % WARP; }

// The value that `source` lane brings; the lane's own where there is no such lane.
template <typename T>
T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp& own = warp();
    std::memcpy(&own.values[lane()], &value, sizeof(T));
    own.barrier.arrive_and_wait();
    if (source < own.lanes) std::memcpy(&value, &own.values[source], sizeof(T));
    own.barrier.arrive_and_wait();
    return value;
}

template <typename Call>
void run_plain(const Call& call, unsigned grid, unsigned threads) {
    blockDim.x = threads, gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call();
}

template <typename Call>
void run_cooperative(const Call& call, unsigned grid, unsigned threads) {
    auto renew = [threads]() noexcept { block.emplace(threads); };
    renew();
    std::barrier<decltype(renew)> next_block(threads, renew);
    auto thread = [&](unsigned index) {
        threadIdx.x = index, blockDim.x = threads, gridDim.x = grid;
        for (unsigned b = 0; b < grid; ++b) {
            blockIdx.x = b;
            call();
            warp().barrier.arrive_and_drop();  // a thread that has returned is waited for no longer
            running_block().barrier.arrive_and_drop();
            next_block.arrive_and_wait();
        }
    };
    std::vector<std::jthread> running;
    for (unsigned index = 0; index < threads; ++index) running.emplace_back(thread, index);
    running.clear();  // joins
    block.reset();
}

// Launch a kernel with the addresses of its arguments, as cuLaunchKernel takes them.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), bool cooperative, unsigned grid, unsigned threads, void** arguments) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        auto call = [&] { kernel(*static_cast<Parameters*>(arguments[I])...); };
        cooperative ? run_cooperative(call, grid, threads) : run_plain(call, grid, threads);
    }(std::index_sequence_for<Parameters...>{});
}

// numpy's code of a scalar ("f4"), "*" and that for a pointer to it, "*" for a pointer to void.
template <typename T>
std::string code() {
    if constexpr (std::is_void_v<T>)
        return "";
    else if constexpr (std::is_pointer_v<T>)
        return "*" + code<std::remove_cv_t<std::remove_pointer_t<T>>>();
    else
        return (std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : "u") + std::to_string(sizeof(T));
}

// The codes of a kernel's parameters, separated by spaces.
template <typename... Parameters>
std::string parameters(void (*)(Parameters...)) {
    std::string all;
    ((all += code<Parameters>() + " "), ...);
    return all;
}

}  // namespace shim

inline void __syncthreads() { shim::running_block().barrier.arrive_and_wait(); }

inline void __syncwarp(unsigned = ~0u) { shim::warp().barrier.arrive_and_wait(); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    return shim::exchange(value, source);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, shim::lane() ^ mask);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
    return shim::exchange(value, shim::lane() + delta);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned ballot = 0;
    for (unsigned source = 0; source < shim::warp().lanes; ++source)
        ballot |= unsigned(shim::exchange(predicate != 0, source)) << source;
    return ballot;
}
