// Attention of a token, of a prefix and of the decoder.

#pragma once

#include "norms.cuh"

const i32 MAX_POSITIONS = 2048, MAX_HEAD_DIM = 256, KEY_LANES = 8, AT_ONCE = 4;  // loads that a thread has on their way

// 16 bytes of keys or values as float32.
__device__ inline void to_floats(const uint4& loaded, f32 (&values)[8]) {
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (i32 i = 0; i < 8; ++i) values[i] = half_to_float((u16)(words[i / 2] >> 16 * (i % 2)));
}

// out [d] of one query, which is in shared memory and scaled, over `count` keys and values [count, d], in float16. All
// threads of the block. d is a multiple of 8.
__device__ inline void attend(const f32* query, const u16* keys, const u16* values, i32 count, i32 d, void* out,
                              u64 out_at, f32 out_scale) {
    constexpr i32 VALUES = 8;  // in 16 bytes
    __shared__ f32 weights[MAX_POSITIONS];
    __shared__ f32 partial[THREADS * VALUES];
    const i32 chunks = d / VALUES, lane = threadIdx.x % KEY_LANES, together = THREADS / KEY_LANES;
    f32 largest = -3.4028235e38f;
    for (i32 first = threadIdx.x / KEY_LANES; first - (i32)threadIdx.x / KEY_LANES < count; first += AT_ONCE * together) {
        f32 score[AT_ONCE] = {};
        for (i32 chunk = lane; chunk < chunks; chunk += KEY_LANES) {
            uint4 loaded[AT_ONCE];
#pragma unroll
            for (i32 i = 0; i < AT_ONCE; ++i)
                loaded[i] = *(const uint4*)(keys + (u64)min(first + i * together, count - 1) * d + chunk * VALUES);
#pragma unroll
            for (i32 i = 0; i < AT_ONCE; ++i) {
                f32 key[VALUES];
                to_floats(loaded[i], key);
#pragma unroll
                for (i32 j = 0; j < VALUES; ++j) score[i] = fmaf(query[chunk * VALUES + j], key[j], score[i]);
            }
        }
#pragma unroll
        for (i32 i = 0; i < AT_ONCE; ++i) {
            for (i32 mask = KEY_LANES / 2; mask > 0; mask /= 2) score[i] += __shfl_xor_sync(ALL_LANES, score[i], mask);
            largest = fmaxf(largest, score[i]);
            if (lane == 0 && first + i * together < count) weights[first + i * together] = score[i];
        }
    }
    largest = across_block<larger>(largest);
    f32 sum = 0;
    for (i32 i = threadIdx.x; i < count; i += THREADS) sum += weights[i] = expf(weights[i] - largest);
    sum = across_block<added>(sum);
    const i32 groups = THREADS / chunks, chunk = threadIdx.x % chunks, own_group = threadIdx.x / chunks;
    if (own_group < groups) {
        f32 total[VALUES] = {};
        for (i32 first = own_group; first < count; first += AT_ONCE * groups) {
            uint4 loaded[AT_ONCE];
#pragma unroll
            for (i32 i = 0; i < AT_ONCE; ++i)
                loaded[i] = *(const uint4*)(values + (u64)min(first + i * groups, count - 1) * d + chunk * VALUES);
#pragma unroll
            for (i32 i = 0; i < AT_ONCE; ++i) {
                const f32 weight = first + i * groups < count ? weights[first + i * groups] : 0;
                f32 value[VALUES];
                to_floats(loaded[i], value);
#pragma unroll
                for (i32 j = 0; j < VALUES; ++j) total[j] = fmaf(weight, value[j], total[j]);
            }
        }
#pragma unroll
        for (i32 j = 0; j < VALUES; ++j) partial[own_group * d + chunk * VALUES + j] = total[j];
    }
    __syncthreads();
    for (i32 i = threadIdx.x; i < d; i += THREADS) {
        f32 total = 0;
        for (i32 group = 0; group < groups; ++group) total += partial[group * d + i];
        store_activation(out, out_at + i, total / sum, out_scale);
    }
}

// Pairs of channels of one head [d]: RMS norm times weight [d], then rotated by a row of the rotary tables [d / 2].
// All lanes of a warp; take(channel, first, second) is called for every pair.
template <typename Take>
__device__ inline void rotate_head(const f32* head, const f32* weight, const f32* cos, const f32* sin, i32 d,
                                   Take take) {
    const i32 lane = threadIdx.x % WARP;
    f32 squares = 0;
    for (i32 i = 2 * lane; i < d; i += 2 * WARP)
        squares = fmaf(head[i], head[i], fmaf(head[i + 1], head[i + 1], squares));
    const f32 root = sqrtf(warp_sum(squares) / d + RMS_NORM_EPS);
    for (i32 i = 2 * lane; i < d; i += 2 * WARP) {
        const f32 even = head[i] / root * weight[i], odd = head[i + 1] / root * weight[i + 1];
        const f32 c = cos[i / 2], s = sin[i / 2];
        take(i, even * c - odd * s, even * s + odd * c);
    }
}

// Of a position's 2H heads: the row of the rotary tables that rotates one. Keys, and the queries of the first half of
// the heads, rotate by where they are, the other queries by what they predict.
__device__ inline u64 rotary_row(i32 head, i32 H, i32 own, i32 target) {
    return head >= H / 2 && head < H ? target : own;
}

// One new position of every row, at start [R]: its keys and values go to the caches [R, H, S, d], and its queries
// attend to all positions up to it. qkv [R, 3HD], norm_weight [2H, d], out [R, H, d]. Grid: R * H blocks.
extern "C" __global__ BOUNDED void attend_step(const f32* qkv, const i32* own, const i32* targets, const i32* start,
                                               const f32* norm_weight, const f32* rope_cos, const f32* rope_sin,
                                               u16* keys, u16* values, void* out, i32 H, i32 d, i32 S, f32 out_scale) {
    __shared__ f32 query[MAX_HEAD_DIM];
    const i32 r = blockIdx.x / H, h = blockIdx.x % H, warp = threadIdx.x / WARP, position = start[r];
    const f32* const from = qkv + (u64)r * 3 * H * d;
    const u64 cache = (u64)blockIdx.x * S * d, at = cache + (u64)position * d;
    if (warp < 2) {
        const i32 head = h + warp * H;
        const u64 row = rotary_row(head, H, own[r], targets[r]) * (d / 2);
        const f32 scale = 1 / sqrtf((f32)d);
        rotate_head(from + head * d, norm_weight + head * d, rope_cos + row, rope_sin + row, d,
                    [&](i32 i, f32 first, f32 second) {
                        if (warp == 0) {
                            query[i] = first * scale, query[i + 1] = second * scale;
                        } else {
                            keys[at + i] = float_to_half(first), keys[at + i + 1] = float_to_half(second);
                        }
                    });
    } else {
        for (i32 i = threadIdx.x - 2 * WARP; i < d; i += THREADS - 2 * WARP)
            values[at + i] = float_to_half(from[(2 * H + h) * d + i]);
    }
    __syncthreads();
    attend(query, keys + cache, values + cache, position + 1, d, out, (u64)blockIdx.x * d, out_scale);
}

// All positions of a prefix: keys and values to keys, values [G, H, T, d]; queries, scaled, stay in qkv [G*T, 3HD].
// Grid: a warp for every head of every position, G*T*3H in all.
extern "C" __global__ BOUNDED void rotate_prefix(f32* qkv, const i32* own, const i32* targets, const f32* norm_weight,
                                                 const f32* rope_cos, const f32* rope_sin, u16* keys, u16* values,
                                                 i32 M, i32 T, i32 H, i32 d) {
    const i32 item = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, m = item / (3 * H), head = item % (3 * H);
    if (m >= M) return;  // the whole warp
    f32* const from = qkv + ((u64)m * 3 * H + head) * d;
    const u64 to = (((u64)(m / T) * H + head % H) * T + m % T) * d;
    if (head >= 2 * H) {
        for (i32 i = threadIdx.x % WARP; i < d; i += WARP) values[to + i] = float_to_half(from[i]);
        return;
    }
    const u64 row = rotary_row(head, H, own[m], targets[m]) * (d / 2);
    const f32 scale = 1 / sqrtf((f32)d);
    rotate_head(from, norm_weight + head * d, rope_cos + row, rope_sin + row, d, [&](i32 i, f32 first, f32 second) {
        if (head < H) {
            from[i] = first * scale, from[i + 1] = second * scale;
        } else {
            keys[to + i] = float_to_half(first), keys[to + i + 1] = float_to_half(second);
        }
    });
}

// Every position of a prefix attends to itself and those before: what rotate_prefix left -> out [G*T, H, d].
// Grid: G*T*H blocks.
extern "C" __global__ BOUNDED void attend_prefix(const f32* qkv, const u16* keys, const u16* values, void* out, i32 T,
                                                 i32 H, i32 d, f32 out_scale) {
    __shared__ f32 query[MAX_HEAD_DIM];
    const i32 m = blockIdx.x / H, h = blockIdx.x % H;
    for (i32 i = threadIdx.x; i < d; i += THREADS) query[i] = qkv[((u64)m * 3 * H + h) * d + i];
    __syncthreads();
    const u64 row = ((u64)(m / T) * H + h) * T * d;
    attend(query, keys + row, values + row, m % T + 1, d, out, (u64)blockIdx.x * d, out_scale);
}

const i32 WARP_QUERIES = 16, QUERIES = WARPS * WARP_QUERIES, KEYS = 64;  // of a block; keys and values at a time

// The decoder's, as FlashAttention does it (online softmax): each of an image's T positions attends to all.
// qkv float16 [I*T, 3HD], out [I*T, H, d]; d is a multiple of 4, at most DIM. A warp has WARP_QUERIES queries; the
// largest score of each so far is what its sums are relative to. Grid: I * H * ceil(T / QUERIES).
template <i32 DIM>
__device__ void attend_all(const u16* qkv, void* out, i32 T, i32 H, i32 d, f32 out_scale) {
    alignas(8) __shared__ u16 keys[KEYS][DIM + 8];  // rows 16 bytes longer, for the sake of banks
    alignas(8) __shared__ u16 values[DIM][KEYS + 8];
    const i32 tiles = (T + QUERIES - 1) / QUERIES, h = blockIdx.x / tiles % H, image = blockIdx.x / tiles / H;
    const i32 group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    const i32 first_query = blockIdx.x % tiles * QUERIES + threadIdx.x / WARP * WARP_QUERIES;
    const u64 width = (u64)3 * H * d;
    const u16* const from = qkv + image * T * width + h * d;
    const f32 scale = 1 / sqrtf((f32)d);
    const uint2 none = {0, 0};
    u32 query[DIM / 16][4];
#pragma unroll
    for (i32 step = 0; step < DIM / 16; ++step)
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            const i32 row = first_query + group + 8 * half, channel = 16 * step + 4 * quarter;
            const uint2 loaded = row < T && channel < d ? *(const uint2*)(from + row * width + channel) : none;
            query[step][half] = loaded.x, query[step][2 + half] = loaded.y;
        }
    f32 total[DIM / 8][4] = {}, sum[2] = {}, largest[2] = {-3.4028235e38f, -3.4028235e38f};
    for (i32 first = 0; first < T; first += KEYS) {
        __syncthreads();  // the keys before may still be read
        for (i32 i = threadIdx.x; i < KEYS * DIM / 4; i += THREADS) {
            const i32 key = i / (DIM / 4), channel = i % (DIM / 4) * 4;
            const bool inside = first + key < T && channel < d;
            const u16* const at = from + (first + key) * width + channel;
            const uint2 value = inside ? *(const uint2*)(at + 2 * H * d) : none;
            *(uint2*)&keys[key][channel] = inside ? *(const uint2*)(at + H * d) : none;
            values[channel][key] = (u16)value.x, values[channel + 1][key] = (u16)(value.x >> 16);
            values[channel + 2][key] = (u16)value.y, values[channel + 3][key] = (u16)(value.y >> 16);
        }
        __syncthreads();
        f32 score[KEYS / 8][4] = {}, before[2] = {largest[0], largest[1]};
#pragma unroll
        for (i32 tile = 0; tile < KEYS / 8; ++tile) {
#pragma unroll
            for (i32 step = 0; step < DIM / 16; ++step) {
                const uint2 loaded = *(const uint2*)&keys[8 * tile + group][16 * step + 4 * quarter];
                const u32 b[2] = {loaded.x, loaded.y};
                mma(score[tile], query[step], b);
            }
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                const bool inside = first + 8 * tile + 2 * quarter + i % 2 < T;
                score[tile][i] = inside ? score[tile][i] * scale : -__int_as_float(0x7f800000);
                largest[i / 2] = fmaxf(largest[i / 2], score[tile][i]);
            }
        }
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            for (i32 mask = 1; mask < 4; mask *= 2)
                largest[half] = fmaxf(largest[half], __shfl_xor_sync(ALL_LANES, largest[half], mask));
            const f32 shrink = expf(before[half] - largest[half]);
            sum[half] *= shrink;
#pragma unroll
            for (i32 c = 0; c < DIM / 8; ++c) total[c][2 * half] *= shrink, total[c][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (i32 step = 0; step < KEYS / 16; ++step) {
            u32 a[4];  // what was a sum of two tiles is an operand
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                f32* const pair = &score[2 * step + i / 2][i % 2 * 2];
                for (i32 j = 0; j < 2; ++j) sum[i % 2] += pair[j] = expf(pair[j] - largest[i % 2]);
                a[i] = halves(pair[0], pair[1]);
            }
#pragma unroll
            for (i32 c = 0; c < DIM / 8; ++c) {
                const u16* const at = &values[8 * c + group][16 * step + 2 * quarter];
                const u32 b[2] = {*(const u32*)at, *(const u32*)(at + 8)};
                mma(total[c], a, b);
            }
        }
    }
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
        for (i32 mask = 1; mask < 4; mask *= 2) sum[half] += __shfl_xor_sync(ALL_LANES, sum[half], mask);
        const i32 row = first_query + group + 8 * half;
#pragma unroll
        for (i32 c = 0; c < DIM / 8; ++c)
#pragma unroll
            for (i32 i = 0; i < 2; ++i) {
                const i32 channel = 8 * c + 2 * quarter + i;
                if (row < T && channel < d)
                    store_activation(out, ((u64)(image * T + row) * H + h) * d + channel,
                                     total[c][2 * half + i] / sum[half], out_scale);
            }
    }
}

extern "C" __global__ BOUNDED void attend_image_64(const u16* qkv, void* out, i32 T, i32 H, i32 d, f32 out_scale) {
    attend_all<64>(qkv, out, T, H, d, out_scale);
}

extern "C" __global__ BOUNDED void attend_image_128(const u16* qkv, void* out, i32 T, i32 H, i32 d, f32 out_scale) {
    attend_all<128>(qkv, out, T, H, d, out_scale);
}
