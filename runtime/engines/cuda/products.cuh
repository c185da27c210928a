// Products (GEMM): out = x W^T + bias, and what is done with it on the way out (epilogue).

#pragma once

#include "primitives.cuh"

// What becomes of a value. SWIGLU takes outputs in pairs, 2j and 2j + 1, to silu(first) * second.
enum Activation { IDENTITY, SILU, GELU, SWIGLU };

// Where it goes. STORE: float32 [M, N]. INPUT: an activation [M, N] for another product; both are N / 2 wide after
// SWIGLU. ADD: onto float32 [M, N], times a gate if there is one. PIECES: float16 [N / group, M, group]. TABLE: float16
// through addresses, row m to row m % group of what out[m / group] points to.
enum Destination { STORE, INPUT, ADD, PIECES, TABLE };

// x [M, K], K a multiple of 8, N outputs; gate rows and TABLE's rows have `stride` values, TABLE's begin at `offset`.
// block: values that share a scale (INT4). out_scale: of an INT8 activation, else 0.
#define PRODUCT_PARAMETERS \
    const void *weight, const void *scale, const f32 *bias, const void *x, void *out, const u16 *gate, i32 M, i32 N, \
    i32 K, i32 block, f32 input_scale, i32 activation, i32 destination, f32 out_scale, i32 group, i32 stride, i32 offset
#define PRODUCT \
    {weight, scale, bias, x, out, gate, M, N, K, block, input_scale, activation, destination, out_scale, group, \
    stride, offset}

struct Product {
    const void *weight, *scale;
    const f32* bias;
    const void* x;
    void* out;
    const u16* gate;
    i32 M, N, K, block;
    f32 input_scale;
    i32 activation, destination;
    f32 out_scale;
    i32 group, stride, offset;
};

__device__ inline f32 activated(f32 value, i32 activation) {
    if (activation == SILU) return silu(value);
    if (activation == GELU) return 0.5f * value * (1 + erff(value * 0.70710678f));
    return value;
}

__device__ inline void put(const Product& p, i32 m, i32 o, f32 value) {
    const i32 width = p.activation == SWIGLU ? p.N / 2 : p.N;
    const u64 at = (u64)m * width + o;
    if (p.destination == STORE) {
        ((f32*)p.out)[at] = value;
    } else if (p.destination == INPUT) {
        store_activation(p.out, at, value, p.out_scale);
    } else if (p.destination == ADD) {
        if (p.gate) value *= half_to_float(p.gate[(u64)m * p.stride + o]);
        ((f32*)p.out)[at] += value;
    } else if (p.destination == PIECES) {
        ((u16*)p.out)[((u64)(o / p.group) * p.M + m) * p.group + o % p.group] = float_to_half(value);
    } else {
        u16* const out = ((u16* const*)p.out)[m / p.group];
        out[(u64)(m % p.group) * p.stride + p.offset + o] = float_to_half(value);
    }
}

// Forms of weights. TILE outputs lie in chunks of 16 bytes for every lane of a warp, one load for each. A chunk is good
// for STEPS products of tensor cores, DEPTH inputs each: `read` brings rows `row` and `row` + 8 of x, and `unpack` makes
// of a lane's `words` the weights of output o that go with them. Of every 16 inputs, lane 4g + q has four, from 4q on, in
// both: which of them a tensor core takes for which does not matter. `finish` makes a sum what it stands for.
//
// Nothing branches on what lies outside, so that loads need not wait for one another: rows there are the last one, their
// sums are sent nowhere; inputs there are the last ones, their weights are zero.

const i32 TILE = 8;

struct HalfInput {
    typedef f32 Sum;
    static const i32 DEPTH = 16;
    static __device__ inline void read(const Product& p, i32 row, i32 k, u32 (&a)[4]) {
        const u16* const from = (const u16*)p.x + min(k, p.K - 4);
        const uint2 upper = *(const uint2*)(from + (u64)min(row, p.M - 1) * p.K);
        const uint2 lower = *(const uint2*)(from + (u64)min(row + 8, p.M - 1) * p.K);
        a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
    }
};

struct Fp16 : HalfInput {
    static const i32 STEPS = 2;
    static __device__ inline void unpack(const Product&, i32, i32, const u32 (&words)[4], i32 step, u32 (&b)[2]) {
        b[0] = words[2 * step], b[1] = words[2 * step + 1];
    }
    static __device__ inline f32 finish(const Product&, i32, f32 sum) { return sum; }
};

// A float16 of 1024 and more counts in ones, so the low bits of 1024 can be a small whole number.
const u32 HALVES_1024 = 0x64006400u;

// Values plus 128, and one float32 scale [N].
struct Int8Weight : HalfInput {
    static const i32 STEPS = 4;
    static __device__ inline void unpack(const Product&, i32, i32, const u32 (&words)[4], i32 step, u32 (&b)[2]) {
        b[0] = subtract_halves(__byte_perm(words[step], HALVES_1024, 0x5150), HALVES_1024 + 0x00800080);
        b[1] = subtract_halves(__byte_perm(words[step], HALVES_1024, 0x5352), HALVES_1024 + 0x00800080);
    }
    static __device__ inline f32 finish(const Product& p, i32 o, f32 sum) { return sum * ((const f32*)p.scale)[o]; }
};

// Values plus 8, and float16 scales [N, K / block]; a block is a power of two, 16 to 128. Of the eight values of a word,
// those of the first step are nibbles 0, 4, 1, 5, those of the second 2, 6, 3, 7.
struct Int4Weight : HalfInput {
    static const i32 STEPS = 8;
    static __device__ inline void unpack(const Product& p, i32 o, i32 k, const u32 (&words)[4], i32 step, u32 (&b)[2]) {
        const i32 shift = 31 - __clz(p.block);
        const i32 blocks = p.K >> shift, block = min(k >> shift, blocks - 1);
        const u32 scale = ((const u16*)p.scale)[(u64)min(o, p.N - 1) * blocks + block] * 0x00010001u;
        const u32 word = words[step / 2] >> 8 * (step % 2);
        for (i32 i = 0; i < 2; ++i) {
            const u32 values = (word >> 4 * i & 0x000f000fu) | HALVES_1024;
            b[i] = multiply_halves(subtract_halves(values, HALVES_1024 + 0x00080008), scale);
        }
    }
    static __device__ inline f32 finish(const Product&, i32, f32 sum) { return sum; }
};

// Static W8A8: x is INT8 with input_scale, weights have one float32 scale [N]. K is a multiple of 16.
struct Int8 {
    typedef i32 Sum;
    static const i32 STEPS = 2, DEPTH = 32;
    static __device__ inline void read(const Product& p, i32 row, i32 k, u32 (&a)[4]) {
        const i8* const upper = (const i8*)p.x + (u64)min(row, p.M - 1) * p.K;
        const i8* const lower = (const i8*)p.x + (u64)min(row + 8, p.M - 1) * p.K;
        const i32 second = min(k + 16, p.K - 4);
        k = min(k, p.K - 4);
        a[0] = *(const u32*)(upper + k), a[1] = *(const u32*)(lower + k);
        a[2] = *(const u32*)(upper + second), a[3] = *(const u32*)(lower + second);
    }
    static __device__ inline void unpack(const Product&, i32, i32, const u32 (&words)[4], i32 step, u32 (&b)[2]) {
        b[0] = words[2 * step], b[1] = words[2 * step + 1];
    }
    static __device__ inline f32 finish(const Product& p, i32 o, i32 sum) {
        return (f32)sum * (p.input_scale * ((const f32*)p.scale)[o]);
    }
};

// Sends off the sums of outputs o, which is even, and o + 1 in row m.
template <typename Form>
__device__ inline void emit(const Product& p, i32 m, i32 o, typename Form::Sum first, typename Form::Sum second) {
    if (m >= p.M || o >= p.N) return;
    const f32 value = Form::finish(p, o, first) + p.bias[o];
    if (p.activation == SWIGLU) {
        put(p, m, o / 2, silu(value) * (Form::finish(p, o + 1, second) + p.bias[o + 1]));
        return;
    }
    put(p, m, o, activated(value, p.activation));
    if (o + 1 < p.N) put(p, m, o + 1, activated(Form::finish(p, o + 1, second) + p.bias[o + 1], p.activation));
}

template <typename Form>
__device__ inline i32 chunks_of(const Product& p) {
    return (p.K + Form::STEPS * Form::DEPTH - 1) / (Form::STEPS * Form::DEPTH);
}

// Where this lane's part of a chunk of a tile lies; of the last tile where there are not so many.
template <typename Form>
__device__ inline const uint4* chunk_at(const Product& p, i32 tile, i32 chunk) {
    const i32 last = (p.N + TILE - 1) / TILE - 1;
    const u64 before = (u64)min(tile, last) * chunks_of<Form>(p) + chunk;
    return (const uint4*)p.weight + before * WARP + threadIdx.x % WARP;
}

// What a chunk gives to the sums of ROW_TILES times 16 rows, from first_row on, and of TILES tiles, from `tile` on.
template <typename Form, i32 ROW_TILES, i32 TILES>
__device__ inline void add_chunk(const Product& p, i32 first_row, i32 tile, i32 chunk, const uint4 (&loaded)[TILES],
                                 typename Form::Sum (&sum)[ROW_TILES][TILES][4]) {
    const i32 group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (i32 step = 0; step < Form::STEPS; ++step) {
        const i32 k = (chunk * Form::STEPS + step) * Form::DEPTH;
        u32 b[TILES][2];
#pragma unroll
        for (i32 t = 0; t < TILES; ++t) {
            const u32 words[4] = {loaded[t].x, loaded[t].y, loaded[t].z, loaded[t].w};
            Form::unpack(p, (tile + t) * TILE + group, k, words, step, b[t]);
        }
#pragma unroll
        for (i32 r = 0; r < ROW_TILES; ++r) {
            u32 a[4];
            Form::read(p, first_row + 16 * r + group, k + 4 * quarter, a);
#pragma unroll
            for (i32 t = 0; t < TILES; ++t) mma(sum[r][t], a, b[t]);
        }
    }
}

// A sum is one of WARPS parts, added in order: part i takes the i-th `share` of the chunks.
template <typename Form>
__device__ inline i32 share_of(const Product& p) {
    return (chunks_of<Form>(p) + WARPS - 1) / WARPS;
}

// Few rows, where reading the weights is what takes time, split along K: a block has one tile and 16 * ROW_TILES rows, a
// warp one part of their sums. Grid: ceil(N / TILE) * ceil(M / (16 * ROW_TILES)).
template <typename Form, i32 ROW_TILES>
__device__ void few_rows(const Product& p) {
    constexpr i32 ROWS = 16 * ROW_TILES, IN_FLIGHT = ROW_TILES > 2 ? 4 : 8;  // loads that a lane has on their way
    __shared__ typename Form::Sum parts[WARPS][ROWS][TILE];
    const i32 tiles = (p.N + TILE - 1) / TILE, tile = blockIdx.x % tiles, first_row = blockIdx.x / tiles * ROWS;
    const i32 warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    const i32 begin = warp * share_of<Form>(p), end = min(begin + share_of<Form>(p), chunks_of<Form>(p));
    typename Form::Sum sum[ROW_TILES][1][4] = {};
    for (i32 first = begin; first < end; first += IN_FLIGHT) {
        uint4 loaded[IN_FLIGHT][1];
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; ++i)
            if (first + i < end) loaded[i][0] = load_once(chunk_at<Form>(p, tile, first + i));
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; ++i)
            if (first + i < end) add_chunk<Form>(p, first_row, tile, first + i, loaded[i], sum);
    }
#pragma unroll
    for (i32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (i32 i = 0; i < 4; ++i) parts[warp][16 * r + group + i / 2 * 8][2 * quarter + i % 2] = sum[r][0][i];
    __syncthreads();
    for (i32 i = threadIdx.x; i < ROWS * TILE / 2; i += THREADS) {
        const i32 row = i / (TILE / 2), output = i % (TILE / 2) * 2;
        typename Form::Sum first = parts[0][row][output], second = parts[0][row][output + 1];
        for (i32 part = 1; part < WARPS; ++part) first += parts[part][row][output], second += parts[part][row][output + 1];
        emit<Form>(p, first_row + row, tile * TILE + output, first, second);
    }
}

const i32 WARP_ROWS = 32, WARP_OUTPUTS = 32, BLOCK_ROWS = 4 * WARP_ROWS, BLOCK_OUTPUTS = 2 * WARP_OUTPUTS;

// Many rows, tiled: a warp has WARP_ROWS of them and WARP_OUTPUTS outputs, and takes one part of their sums after the other,
// with the weights of the next chunk on their way. Four warps read the same ones. Grid: ceil(N / BLOCK_OUTPUTS) *
// ceil(M / BLOCK_ROWS).
template <typename Form>
__device__ void many_rows(const Product& p) {
    constexpr i32 ROW_TILES = WARP_ROWS / 16, TILES = WARP_OUTPUTS / TILE;
    const i32 blocks = (p.N + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS, warp = threadIdx.x / WARP;
    const i32 first_row = blockIdx.x / blocks * BLOCK_ROWS + warp % 4 * WARP_ROWS;
    const i32 tile = (blockIdx.x % blocks * BLOCK_OUTPUTS + warp / 4 * WARP_OUTPUTS) / TILE;
    const i32 group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    typename Form::Sum total[ROW_TILES][TILES][4] = {};
#pragma unroll 1
    for (i32 part = 0; part < WARPS; ++part) {
        const i32 begin = part * share_of<Form>(p), end = min(begin + share_of<Form>(p), chunks_of<Form>(p));
        typename Form::Sum sum[ROW_TILES][TILES][4] = {};
        uint4 next[TILES];
#pragma unroll
        for (i32 t = 0; t < TILES; ++t)
            if (begin < end) next[t] = __ldg(chunk_at<Form>(p, tile + t, begin));
#pragma unroll 1
        for (i32 chunk = begin; chunk < end; ++chunk) {
            uint4 loaded[TILES];
#pragma unroll
            for (i32 t = 0; t < TILES; ++t) {
                loaded[t] = next[t];
                if (chunk + 1 < end) next[t] = __ldg(chunk_at<Form>(p, tile + t, chunk + 1));
            }
            add_chunk<Form>(p, first_row, tile, chunk, loaded, sum);
        }
#pragma unroll
        for (i32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (i32 t = 0; t < TILES; ++t)
#pragma unroll
                for (i32 i = 0; i < 4; ++i) total[r][t][i] += sum[r][t][i];
    }
#pragma unroll
    for (i32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (i32 t = 0; t < TILES; ++t)
#pragma unroll
            for (i32 half = 0; half < 2; ++half) {
                const i32 m = first_row + 16 * r + 8 * half + group, o = (tile + t) * TILE + 2 * quarter;
                emit<Form>(p, m, o, total[r][t][2 * half], total[r][t][2 * half + 1]);
            }
}

extern "C" __global__ BOUNDED void few_rows_fp16_16(PRODUCT_PARAMETERS) { few_rows<Fp16, 1>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_fp16_32(PRODUCT_PARAMETERS) { few_rows<Fp16, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_fp16_64(PRODUCT_PARAMETERS) { few_rows<Fp16, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void many_rows_fp16(PRODUCT_PARAMETERS) { many_rows<Fp16>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_16(PRODUCT_PARAMETERS) { few_rows<Int8, 1>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_32(PRODUCT_PARAMETERS) { few_rows<Int8, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_64(PRODUCT_PARAMETERS) { few_rows<Int8, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void many_rows_int8(PRODUCT_PARAMETERS) { many_rows<Int8>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_weight_16(PRODUCT_PARAMETERS) { few_rows<Int8Weight, 1>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_weight_32(PRODUCT_PARAMETERS) { few_rows<Int8Weight, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int8_weight_64(PRODUCT_PARAMETERS) { few_rows<Int8Weight, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void many_rows_int8_weight(PRODUCT_PARAMETERS) { many_rows<Int8Weight>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int4_weight_16(PRODUCT_PARAMETERS) { few_rows<Int4Weight, 1>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int4_weight_32(PRODUCT_PARAMETERS) { few_rows<Int4Weight, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void few_rows_int4_weight_64(PRODUCT_PARAMETERS) { few_rows<Int4Weight, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void many_rows_int4_weight(PRODUCT_PARAMETERS) { many_rows<Int4Weight>(PRODUCT); }
