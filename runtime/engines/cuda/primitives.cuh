// What the kernels of the model share: float16, tensor cores, activations.

#pragma once

#include "common.cuh"

const i32 THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
const u32 ALL_LANES = 0xffffffffu;

// One block a multiprocessor is enough to launch, so that the compiler may give a thread up to 255 registers.
#define BOUNDED __launch_bounds__(THREADS, 1)

#ifdef __CUDACC__
__device__ inline f32 half_to_float(u16 bits) {
    f32 value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline u16 float_to_half(f32 value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline u32 subtract_halves(u32 a, u32 b) {
    u32 difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

__device__ inline u32 multiply_halves(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Weights that one block reads, once: they would only push activations out of L1.
__device__ inline uint4 load_once(const uint4* from) {
    uint4 words;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(from));
    return words;
}

// Tensor cores: a warp adds to [16, 8] sums the product of a [16, DEPTH] and b [8, DEPTH], both along DEPTH. Of lane
// 4g + q, sum holds columns 2q and 2q + 1 of row g, then of row g + 8. DEPTH is 16 for float16, of which a holds
// 2q and 2q + 1 of row g, the same of row g + 8, then 2q + 8 and 2q + 9 of both, and b those two pairs of column g;
// it is 32 for INT8, where four values from 4q and from 4q + 16 on stand for the pairs.
__device__ inline void mma(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma(i32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
inline uint4 load_once(const uint4* from) { return *from; }  // the others come with the CPU's stand-in
#endif

__device__ inline u32 halves(f32 first, f32 second) { return float_to_half(first) | (u32)float_to_half(second) << 16; }

__device__ inline f32 silu(f32 x) { return x / (1 + expf(-x)); }

// ---- activations: float16, or INT8 with a static scale where `scale` is not 0 ----

__device__ inline void store_activation(void* out, u64 i, f32 value, f32 scale) {
    if (scale == 0)
        ((u16*)out)[i] = float_to_half(value);
    else
        ((i8*)out)[i] = (i8)fminf(fmaxf(rintf(value / scale), -128.f), 127.f);
}
