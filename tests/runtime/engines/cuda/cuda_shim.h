// Enough of CUDA's C++ for a host compiler to build our .cu files and run them on the CPU. Force-included before them.
//
// Blocks run in turn. A cooperative kernel (one that shares memory or synchronizes) runs every CUDA thread of a block as
// a fiber of its own, which is left at barriers only. Any other kernel runs as a plain loop. Every thread of a warp must
// take part in its shuffles, and shuffled values are at most 8 bytes.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change to another fiber's stack

#include <atomic>
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
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

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

inline float half_to_float(unsigned short bits) { return std::bit_cast<_Float16>(bits); }

inline unsigned short float_to_half(float value) { return std::bit_cast<unsigned short>(_Float16(value)); }

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    return a < b ? std::common_type_t<A, B>(a) : std::common_type_t<A, B>(b);
}

inline float sinpif(float x) { return std::sin(M_PI * x); }

inline float cospif(float x) { return std::cos(M_PI * x); }

template <typename T>
T __ldg(const T* from) {
    return *from;
}

inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }

// Four bytes, each chosen by four bits of `selector` from those of `low` (0 to 3) and `high` (4 to 7).
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = low | uint64_t(high) << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}

namespace shim {

// Both halves of words that hold two float16.
template <typename Combine>
unsigned of_halves(unsigned a, unsigned b, Combine combine) {
    unsigned both = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const _Float16 result = combine(std::bit_cast<_Float16>(uint16_t(a >> shift)), std::bit_cast<_Float16>(uint16_t(b >> shift)));
        both |= unsigned(std::bit_cast<uint16_t>(result)) << shift;
    }
    return both;
}

}  // namespace shim

inline unsigned subtract_halves(unsigned a, unsigned b) {
    return shim::of_halves(a, b, [](_Float16 x, _Float16 y) { return _Float16(x - y); });
}

inline unsigned multiply_halves(unsigned a, unsigned b) {
    return shim::of_halves(a, b, [](_Float16 x, _Float16 y) { return _Float16(x * y); });
}

namespace shim {

constexpr unsigned WARP = 32;

// A CUDA thread of the running block. It gives way to the next one by `pass_on`, and goes on when its turn comes again.
// Once it is through it waits for the next block: making one anew costs more than most blocks do.
struct Fiber {
    static constexpr size_t STACK = 64 * 1024;
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    jmp_buf place;
    bool started = false, done;
};

inline std::deque<Fiber> fibers;
inline std::thread::id owner;  // of the fibers: one is never continued by another thread
inline size_t running;
inline jmp_buf all_done;
inline void (*run_call)(const void*);
inline const void* running_call;

// Continues the next fiber in turn that is not done; where there is none, `run_cooperative`.
[[noreturn]] inline void continue_next() {
    for (size_t i = 1; i <= blockDim.x; ++i) {
        const size_t next = (running + i) % blockDim.x;
        if (fibers[next].done) continue;
        running = threadIdx.x = next;
        if (fibers[next].started) _longjmp(fibers[next].place, 1);
        fibers[next].started = true;
        setcontext(&fibers[next].start);
    }
    _longjmp(all_done, 1);
}

__attribute__((noinline)) inline void pass_on() {
    if (!_setjmp(fibers[running].place)) continue_next();
}

// As std::barrier.
class Barrier {
public:
    explicit Barrier(unsigned count) : count_(count), missing_(count) {}
    void arrive_and_wait() {
        const unsigned phase = phase_;
        arrive();
        while (phase == phase_) pass_on();
    }
    void arrive_and_drop() {
        --count_;
        arrive();
    }

private:
    void arrive() {
        if (--missing_ == 0) missing_ = count_, ++phase_;
    }
    unsigned count_, missing_, phase_ = 0;
};

// The operands of a product of tensor cores: a [16, DEPTH] and b [8, DEPTH].
template <typename Value, unsigned DEPTH>
struct Operands {
    Value a[16][DEPTH], b[8][DEPTH];
};

struct Warp {
    explicit Warp(unsigned lanes) : lanes(lanes), barrier(lanes) {}
    unsigned lanes;
    Barrier barrier;
    uint64_t values[2][WARP];  // of this exchange and of the one before, which a slow lane may still be reading
    Operands<float, 16> halves[2];
    Operands<int, 32> bytes[2];
    unsigned exchanges[WARP] = {};
};

// What the threads of the running block share.
struct Block {
    explicit Block(unsigned threads) : barrier(threads) {
        for (unsigned first = 0; first < threads; first += WARP) warps.emplace_back(std::min(WARP, threads - first));
    }
    Barrier barrier;
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
    auto& values = own.values[own.exchanges[lane()]++ % 2];
    std::memcpy(&values[lane()], &value, sizeof(T));
    own.barrier.arrive_and_wait();
    if (source < own.lanes) std::memcpy(&value, &values[source], sizeof(T));
    return value;
}

template <typename Call>
void run_plain(const Call& call, unsigned grid, unsigned threads) {
    blockDim.x = threads, gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call();
}

[[noreturn]] inline void live() {
    for (;;) {
        run_call(running_call);
        warp().barrier.arrive_and_drop();  // a thread that has returned is waited for no longer
        running_block().barrier.arrive_and_drop();
        fibers[running].done = true;
        pass_on();
    }
}

template <typename Call>
void run_cooperative(const Call& call, unsigned grid, unsigned threads) {
    running_call = &call;
    run_call = [](const void* called) { (*static_cast<const Call*>(called))(); };
    blockDim.x = threads, gridDim.x = grid;
    if (std::exchange(owner, std::this_thread::get_id()) != std::this_thread::get_id()) fibers.clear();
    while (fibers.size() < threads) {
        Fiber& fiber = fibers.emplace_back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = Fiber::STACK;
        makecontext(&fiber.start, live, 0);
    }
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        block.emplace(threads);
        for (unsigned index = 0; index < threads; ++index) fibers[index].done = false;
        running = threads - 1;  // so that thread 0 is the next in turn
        if (!_setjmp(all_done)) continue_next();
    }
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

// What tensor cores do (primitives.cuh says which lane holds what): VALUES of a register, from column VALUES * q and from
// DEPTH / 2 further on. `value` takes the i-th one out of it.
template <unsigned VALUES, typename Sum, typename Value, unsigned DEPTH, typename Take>
void multiply(Sum (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], shim::Operands<Value, DEPTH> (&both)[2],
              Take value) {
    shim::Warp& own = shim::warp();
    const unsigned group = shim::lane() / 4, first = shim::lane() % 4 * VALUES;
    auto& operands = both[own.exchanges[shim::lane()]++ % 2];
    for (unsigned half = 0; half < 2; ++half)
        for (unsigned i = 0; i < VALUES; ++i) {
            const unsigned k = first + half * DEPTH / 2 + i;
            operands.a[group][k] = value(a[2 * half], i), operands.a[group + 8][k] = value(a[2 * half + 1], i);
            operands.b[group][k] = value(b[half], i);
        }
    own.barrier.arrive_and_wait();
    for (unsigned i = 0; i < 4; ++i) {
        const Value *const row = operands.a[group + i / 2 * 8], *const column = operands.b[shim::lane() % 4 * 2 + i % 2];
        for (unsigned k = 0; k < DEPTH; ++k) sum[i] += row[k] * column[k];
    }
}

inline void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply<2>(sum, a, b, shim::warp().halves, [](unsigned word, unsigned i) { return half_to_float(word >> 16 * i); });
}

inline void mma(int (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply<4>(sum, a, b, shim::warp().bytes, [](unsigned word, unsigned i) { return int8_t(word >> 8 * i); });
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T atomicAdd(T* to, T value) {
    return std::atomic_ref(*to).fetch_add(value);
}

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
