// What ptx.py writes instructions of PTX with, above cuda_shim.h and SHARED_BYTES.
#pragma once

#include <cstdio>
#include <limits>
#include <unordered_map>

namespace ptx {

alignas(16) inline char memory[SHARED_BYTES];  // of the running block
inline const char* kernel = "";

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "%s: %s\n", kernel, what);
    std::abort();
}

// -- data races, found where PTX_RACES is set: slow ------------------------------------------------------------------

inline const bool finds_races = std::getenv("PTX_RACES");
inline unsigned phases[1024];  // barriers that each thread of the running block has passed

struct Access {
    static constexpr unsigned NONE = ~0u, SEVERAL = ~1u;  // threads
    unsigned thread = NONE, block = 0, phase = 0;

    // Whether the other may just as well come first, if they are of different threads.
    bool meets(const Access& other, bool shared) const {
        if (thread == NONE || (block == other.block && thread == other.thread)) return false;
        return block == other.block ? phase == other.phase : !shared;
    }
};

struct Touched {
    Access written, read;
};

inline std::unordered_map<uint64_t, Touched> touched;  // bytes, in this launch

inline void begin_launch(const char* name) { kernel = name, touched.clear(); }

inline void begin_thread() { phases[threadIdx.x] = 0; }

inline void touch(uint64_t address, size_t size, bool writes, bool shared) {
    const Access now{threadIdx.x, blockIdx.x, phases[threadIdx.x]};
    for (uint64_t byte = address; byte < address + size; ++byte) {
        auto& [written, read] = touched[byte];
        if (written.meets(now, shared) || (writes && read.meets(now, shared))) fail("data race");
        if (writes)
            written = now;
        else if (read.meets(now, shared))
            read = {Access::SEVERAL, read.block == now.block ? now.block : Access::SEVERAL, now.phase};
        else if (read.block != Access::SEVERAL)
            read = now;
    }
}

// --------------------------------------------------------------------------------------------------------------------

// A register's bits as another type of its size, or the low bits of a whole number.
template <typename To, typename From>
To as(From from) {
    if constexpr (sizeof(To) == sizeof(From))
        return std::bit_cast<To>(from);
    else
        return To(from);
}

// A smaller value fills a register up with its sign, or with zeros.
template <typename Register, typename Value>
void set(Register& to, Value value) {
    to = as<Register>(value);
}

inline std::pair<uint32_t, uint32_t> halves(uint64_t value) { return {value, value >> 32}; }

inline std::pair<uint16_t, uint16_t> halves(uint32_t value) { return {value, value >> 16}; }

enum Space { GLOBAL, SHARED, OWN };  // a thread's own are its parameters, too

// An access of several values wants the address of all of them together to be aligned, as a GPU does.
template <typename Value, Space SPACE, size_t COUNT>
Value* place(uint64_t address, bool writes) {
    constexpr size_t SIZE = sizeof(Value) * COUNT;
    if (SPACE == SHARED) {
        const uint32_t offset = address;
        if (offset + SIZE > SHARED_BYTES) fail("address outside of shared memory");
        address = reinterpret_cast<uint64_t>(memory) + offset;
    }
    if (address % SIZE != 0) fail("misaligned address");
    if (finds_races && SPACE != OWN) touch(address, SIZE, writes, SPACE == SHARED);
    return reinterpret_cast<Value*>(address);
}

template <typename Value, Space SPACE, typename... Registers>
void load(uint64_t address, Registers&... to) {
    const Value* from = place<Value, SPACE, sizeof...(to)>(address, false);
    (set(to, *from++), ...);
}

template <typename Value, Space SPACE, typename... Values>
void store(uint64_t address, Values... values) {
    Value* to = place<Value, SPACE, sizeof...(values)>(address, true);
    ((*to++ = values), ...);
}

template <typename T>
auto wide(T value) {
    if constexpr (sizeof(T) == 2) return std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>(value);
    else return std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>(value);
}

template <typename T>
T high_half(T a, T b) {
    return std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>(a) * b >> 8 * sizeof(T);
}

template <typename T>
T smaller(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
    else return a < b ? a : b;
}

template <typename T>
T larger(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
    else return a > b ? a : b;
}

template <typename T>
T shift_left(T value, unsigned by) {
    return by < 8 * sizeof(T) ? T(value << by) : T(0);
}

template <typename T>
T shift_right(T value, unsigned by) {
    return by < 8 * sizeof(T) ? T(value >> by) : T(value < 0 ? -1 : 0);
}

template <typename T>
T inverted(T value) {
    if constexpr (std::is_same_v<T, bool>) return !value;
    else return ~value;
}

// To the nearest value of T where it has none so large, 0 for NaN.
template <typename T>
T saturated(float value) {
    if (std::isnan(value)) return 0;
    if (value <= float(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    if (value >= float(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
    return T(value);
}

inline float within_0_and_1(float value) { return std::isnan(value) ? 0 : larger(0.f, smaller(1.f, value)); }

inline float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.f, value) : value; }

inline float fma_rounded_down(float a, float b, float c) {
    const double exact = double(a) * b + c;  // for the factors and sums of expf
    const float nearest = float(exact);
    return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}

inline unsigned bit_field(unsigned from, unsigned into, unsigned first, unsigned count) {
    const unsigned mask = unsigned(((uint64_t(1) << count) - 1) << first);
    return (into & ~mask) | (from << first & mask);
}

// Of all lanes of a warp, as every shuffle of ours is.
inline unsigned shuffled(unsigned value, unsigned mask, unsigned clamp, unsigned lanes) {
    if (clamp != 31 || lanes != ~0u) fail("shuffle of a part of the warp");
    return __shfl_xor_sync(lanes, value, mask);
}

inline void barrier(unsigned which) {
    if (which != 0) fail("barrier of a part of the block");
    ++phases[threadIdx.x];
    __syncthreads();
}

}  // namespace ptx
