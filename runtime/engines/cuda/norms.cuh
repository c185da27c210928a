// Norms of rows, and their modulation.

#pragma once

#include "primitives.cuh"

const f32 RMS_NORM_EPS = 1e-6f, LAYER_NORM_EPS = 1e-5f;

__device__ inline f32 larger(f32 a, f32 b) { return fmaxf(a, b); }
__device__ inline f32 added(f32 a, f32 b) { return a + b; }

__device__ inline f32 warp_sum(f32 value) {
    for (i32 mask = WARP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
    return value;
}

// The values of all threads of a block, combined; every thread gets the result.
template <f32 (*combine)(f32, f32)>
__device__ inline f32 across_block(f32 value) {
    __shared__ f32 of_warp[THREADS / WARP];
    for (i32 mask = WARP / 2; mask > 0; mask /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, mask));
    __syncthreads();  // the call before may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    value = of_warp[0];
    for (i32 i = 1; i < THREADS / WARP; ++i) value = combine(value, of_warp[i]);
    return value;
}

__device__ inline f32 root_mean_square(const f32* x, i32 D) {
    f32 sum = 0;
    for (i32 i = threadIdx.x; i < D; i += THREADS) sum = fmaf(x[i], x[i], sum);
    return sqrtf(across_block<added>(sum) / D + RMS_NORM_EPS);
}

// RMS norm with adaLN's modulation: out [M, D] is the RMS norm of x [M, D], times scale, plus shift, rows of
// which are `stride` apart; neither where scale is null. With first_weight [D], x itself becomes its norm times that
// before. Grid: a block per row.
extern "C" __global__ BOUNDED void norm_modulate(f32* x, const f32* first_weight, const u16* scale, const u16* shift,
                                                 void* out, i32 D, i32 stride, f32 out_scale) {
    f32* const row = x + (u64)blockIdx.x * D;
    const u64 modulation = (u64)blockIdx.x * stride;
    if (first_weight) {
        const f32 root = root_mean_square(row, D);
        for (i32 i = threadIdx.x; i < D; i += THREADS) row[i] = row[i] / root * first_weight[i];  // this thread's own
    }
    const f32 root = root_mean_square(row, D);
    for (i32 i = threadIdx.x; i < D; i += THREADS) {
        f32 value = row[i] / root;
        if (scale) value = value * half_to_float(scale[modulation + i]) + half_to_float(shift[modulation + i]);
        store_activation(out, (u64)blockIdx.x * D + i, value, out_scale);
    }
}

// The mean of a row x [D] and the root of its variance.
struct Moments {
    f32 mean, deviation;
};

__device__ inline Moments moments(const f32* x, i32 D) {
    f32 sum = 0, squares = 0;
    for (i32 i = threadIdx.x; i < D; i += THREADS) sum += x[i];
    const f32 mean = across_block<added>(sum) / D;
    for (i32 i = threadIdx.x; i < D; i += THREADS) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    return {mean, sqrtf(across_block<added>(squares) / D + LAYER_NORM_EPS)};
}

// An activation [M, D] from rows of x: of every skipped + kept rows the last `kept`. Grid: a block per row of out.
extern "C" __global__ BOUNDED void layer_norm(const f32* x, const f32* weight, const f32* bias, void* out, i32 D,
                                              i32 kept, i32 skipped, f32 out_scale) {
    const i32 m = blockIdx.x;
    const f32* const row = x + ((u64)(m / kept) * (kept + skipped) + skipped + m % kept) * D;
    const Moments of = moments(row, D);
    for (i32 i = threadIdx.x; i < D; i += THREADS)
        store_activation(out, (u64)m * D + i, (row[i] - of.mean) / of.deviation * weight[i] + bias[i], out_scale);
}

// x [M, D] becomes its layer norm. Grid: a block per row.
extern "C" __global__ BOUNDED void layer_norm_in_place(f32* x, const f32* weight, const f32* bias, i32 D) {
    f32* const row = x + (u64)blockIdx.x * D;
    const Moments of = moments(row, D);
    for (i32 i = threadIdx.x; i < D; i += THREADS) row[i] = (row[i] - of.mean) / of.deviation * weight[i] + bias[i];
}
