// The model itself for the engine `cuda`: products with fp16, INT8 and INT4 weights, norms, attention, and the
// decoder's small parts (docs/model.md). `graphs.py` puts them in order; `export/prepack.py` says how weights lie.
//
// An activation, which a product reads, is float16, or INT8 where that product is static W8A8. Modulation, keys and
// values are float16; all else, the residual above all, and every sum is float32 (int32 for W8A8). The order of every
// sum depends on the layer's sizes alone, never on how many rows there are: an image is the same in any batch. Compile
// with --fmad=false; fused multiply-adds are written out.
//
// Every block has THREADS threads. Arrays are dense, their last axis contiguous, unless a stride is given; what is read
// 16 bytes at a time is aligned to 16.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;  // also the bits of a float16
typedef int i32;
typedef unsigned int u32;  // also two float16, the first in the low half
typedef unsigned long long u64;
typedef float f32;

const i32 THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
const u32 ALL_LANES = 0xffffffffu;

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

__device__ inline u64 first_item() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline u64 item_stride() { return (u64)gridDim.x * blockDim.x; }

__device__ inline u32 halves(f32 first, f32 second) { return float_to_half(first) | (u32)float_to_half(second) << 16; }

__device__ inline f32 silu(f32 x) { return x / (1 + expf(-x)); }

// ---- activations: float16, or INT8 with a static scale where `scale` is not 0 ----

__device__ inline void store_activation(void* out, u64 i, f32 value, f32 scale) {
    if (scale == 0)
        ((u16*)out)[i] = float_to_half(value);
    else
        ((i8*)out)[i] = (i8)fminf(fmaxf(rintf(value / scale), -128.f), 127.f);
}

// ---- products: out = x W^T + bias, and what is done with it on the way out ----

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

// Few rows, where reading the weights is what takes time: a block has one tile and 16 * ROW_TILES rows, a warp one part
// of their sums. Grid: ceil(N / TILE) * ceil(M / (16 * ROW_TILES)).
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

// Many rows: a warp has WARP_ROWS of them and WARP_OUTPUTS outputs, and takes one part of their sums after the other,
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

// One block a multiprocessor is enough to launch, so that the compiler may give a thread up to 255 registers.
#define BOUNDED __launch_bounds__(THREADS, 1)

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

// ---- norms ----

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

// out [M, D]: the RMS norm of x [M, D], times scale, plus shift, rows of which are `stride` apart; neither where scale
// is null. With first_weight [D], x itself becomes its norm times that before. Grid: a block per row.
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

// ---- attention ----

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

// The decoder's: each of an image's T positions attends to all. qkv float16 [I*T, 3HD], out [I*T, H, d]; d is a multiple
// of 4, at most DIM. A warp has WARP_QUERIES queries; the largest score of each so far is what its sums are relative to.
// Grid: I * H * ceil(T / QUERIES).
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

// ---- what products read first ----

// out [P, D]: SiLU of a class's embedding plus that of a position. Any grid.
extern "C" __global__ BOUNDED void modulation_input(const i32* class_id, const i32* positions,
                                                    const f32* symbol_embedding, const f32* timesteps_embeddings,
                                                    void* out, i32 P, i32 D, i32 first_class, f32 out_scale) {
    for (u64 i = first_item(); i < (u64)P * D; i += item_stride()) {
        const u64 pair = i / D, d = i % D;
        const f32 embedded = symbol_embedding[(u64)(first_class + class_id[pair]) * D + d];
        store_activation(out, i, silu(timesteps_embeddings[(u64)positions[pair] * D + d] + embedded), out_scale);
    }
}

// out [S, 2F], float16: sines, then cosines, of the ratio's angle at every frequency. Any grid.
extern "C" __global__ BOUNDED void ratio_features(const f32* mask_ratio, const f32* frequencies, u16* out, i32 S,
                                                  i32 F) {
    for (u64 i = first_item(); i < (u64)S * F; i += item_stride()) {
        const u64 s = i / F, f = i % F;
        const f32 turns = mask_ratio[s] * frequencies[f];
        out[s * 2 * F + f] = float_to_half(sinpif(2 * turns));
        out[s * 2 * F + F + f] = float_to_half(cospif(2 * turns));
    }
}

// out [S, R, W]: the head's condition c = SiLU(ratio + latent), through the SiLU before its modulation. Any grid.
extern "C" __global__ BOUNDED void head_condition(const f32* ratio_embedding, const f32* latent, void* out, i32 S,
                                                  i32 R, i32 W, f32 out_scale) {
    for (u64 i = first_item(); i < (u64)S * R * W; i += item_stride()) {
        const u64 s = i / W / R;
        const f32 sum = ratio_embedding[s * W + i % W] + latent[i % ((u64)R * W)];
        store_activation(out, i, silu(silu(sum)), out_scale);
    }
}

// ---- the decoder's ends ----

// out [M, to], float16: rows of `from` values, filled up with zeros. Any grid.
extern "C" __global__ BOUNDED void pad_rows(const f32* x, u16* out, i32 M, i32 from, i32 to) {
    for (u64 i = first_item(); i < (u64)M * to; i += item_stride())
        out[i] = float_to_half(i % to < from ? x[i / to * from + i % to] : 0);
}

// x [I, 1 + cells, D]: the class position, then projected [I, cells, D], plus the positional embedding. Any grid.
extern "C" __global__ BOUNDED void embed_image(const f32* projected, const f32* class_embedding,
                                               const f32* positional_embedding, f32* x, i32 I, i32 cells, i32 D) {
    const u64 image = (u64)(1 + cells) * D;
    for (u64 i = first_item(); i < I * image; i += item_stride()) {
        const u64 within = i % image;
        const f32 value = within < D ? class_embedding[within] : projected[i / image * (image - D) + within - D];
        x[i] = value + positional_embedding[within];
    }
}

// image [I, 3, H, H], H = side * patch: a 3x3 convolution (weight [3, 3, 3, 3], zeros around) over the pixels of
// patches [I, side, side, patch, patch, 3]. Any grid.
extern "C" __global__ BOUNDED void conv_out(const f32* patches, const f32* weight, const f32* bias, f32* image, i32 I,
                                            i32 side, i32 patch) {
    const i32 size = side * patch;
    const u64 plane = (u64)size * size;
    for (u64 i = first_item(); i < I * 3 * plane; i += item_stride()) {
        const i32 channel = i / plane % 3, top = i % plane / size - 1, left = i % size - 1;
        f32 sum = bias[channel];
        for (i32 tap = 0; tap < 27; ++tap) {
            const i32 from = tap / 9, y = top + tap / 3 % 3, x = left + tap % 3;
            if (y < 0 || y >= size || x < 0 || x >= size) continue;
            const u64 cell = (i / plane / 3 * side + y / patch) * side + x / patch;
            const f32 pixel = patches[((cell * patch + y % patch) * patch + x % patch) * 3 + from];
            sum = fmaf(weight[channel * 27 + tap], pixel, sum);
        }
        image[i] = sum;
    }
}
