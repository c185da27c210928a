// The model itself for the engine `cuda`: products with fp16, INT8 and INT4 weights, norms, attention, and the
// decoder's small parts (docs/model.md). `graphs.py` puts them in order; `export/prepack.py` says how weights lie.
//
// Activations are float32, or INT8 where the product that reads them is static W8A8; modulation, keys and values are
// float16; sums are float32 (int32 for W8A8). The order of every sum depends on the layer's sizes alone, never on how
// many rows there are: an image is the same in any batch. Compile with --fmad=false; fused multiply-adds are written
// out.
//
// Every block has THREADS threads. Arrays are dense, their last axis contiguous, unless a stride is given; what is read
// 16 bytes at a time is aligned to 16.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;  // also the bits of a float16
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;

const i32 THREADS = 128, WARP = 32;
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

// Weights are read once a launch: they would only push activations out of L1.
__device__ inline uint4 load_weights(const uint4* from) {
    uint4 words;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(from));
    return words;
}
#else
inline uint4 load_weights(const uint4* from) { return *from; }  // the other two come with the CPU's stand-in
#endif

__device__ inline u64 first_item() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline u64 item_stride() { return (u64)gridDim.x * blockDim.x; }

__device__ inline f32 silu(f32 x) { return x / (1 + expf(-x)); }

// ---- activations: float32, or INT8 with a static scale where `scale` is not 0 ----

__device__ inline void store_activation(void* out, u64 i, f32 value, f32 scale) {
    if (scale == 0)
        ((f32*)out)[i] = value;
    else
        ((i8*)out)[i] = (i8)fminf(fmaxf(rintf(value / scale), -128.f), 127.f);
}

// ---- products: out = x W^T + bias, and what is done with it on the way out ----

// What becomes of a value. SWIGLU takes outputs in pairs, 2j and 2j + 1, to silu(first) * second.
enum Activation { IDENTITY, SILU, GELU, SWIGLU };

// Where it goes. STORE: an activation [M, N], N / 2 wide after SWIGLU. ADD: onto float32 [M, N], times a gate if there
// is one. PIECES: float16 [N / group, M, group]. TABLE: float16 through addresses, row m to row m % group of what
// out[m / group] points to.
enum Destination { STORE, ADD, PIECES, TABLE };

// x [M, K], K a multiple of 8, N outputs; `lanes` threads share an output; gate rows and TABLE's rows have `stride`
// values, TABLE's begin at `offset`. block: values that share a scale (INT4). out_scale: of an INT8 activation, else 0.
#define PRODUCT_PARAMETERS \
    const void *weight, const void *scale, const f32 *bias, const void *x, void *out, const u16 *gate, i32 M, i32 N, \
    i32 K, i32 lanes, i32 block, f32 input_scale, i32 activation, i32 destination, f32 out_scale, i32 group, \
    i32 stride, i32 offset
#define PRODUCT \
    {weight, scale, bias, x, out, gate, M, N, K, lanes, block, input_scale, activation, destination, out_scale, \
    group, stride, offset}

struct Product {
    const void *weight, *scale;
    const f32* bias;
    const void* x;
    void* out;
    const u16* gate;
    i32 M, N, K, lanes, block;
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
    if (p.destination == STORE) {
        const i32 width = p.activation == SWIGLU ? p.N / 2 : p.N;
        store_activation(p.out, (u64)m * width + o, value, p.out_scale);
    } else if (p.destination == ADD) {
        if (p.gate) value *= half_to_float(p.gate[(u64)m * p.stride + o]);
        ((f32*)p.out)[(u64)m * p.N + o] += value;
    } else if (p.destination == PIECES) {
        ((u16*)p.out)[((u64)(o / p.group) * p.M + m) * p.group + o % p.group] = float_to_half(value);
    } else {
        u16* const out = ((u16* const*)p.out)[m / p.group];
        out[(u64)(m % p.group) * p.stride + p.offset + o] = float_to_half(value);
    }
}

// Forms of weights. A row lies in chunks of 16 bytes with VALUES values each, the last one filled up with zeros.
// `unpack` makes 8 values, those from k on, of WORDS words; `read` brings 8 of x to go with them; Elements are
// multiplied and summed; `finish` makes a sum what it stands for.

__device__ inline f32 multiply_add(f32 a, f32 b, f32 sum) { return fmaf(a, b, sum); }
__device__ inline i32 multiply_add(i32 a, i32 b, i32 sum) { return a * b + sum; }

// `value` below 2^23, less `zero`: two instructions where a conversion is slow.
__device__ inline f32 small_float(u32 value, f32 zero) {
    return __int_as_float(0x4b000000 | value) - (8388608.f + zero);
}

__device__ inline i32 signed_byte(u32 word, i32 i) { return (i8)(word >> 8 * i); }

struct FloatInput {
    typedef f32 Element;
    static const bool DOT = false;
    static __device__ inline void read(const Product& p, i32 m, i32 k, f32* values) {
        const f32* const from = (const f32*)p.x + (u64)m * p.K + k;
        const float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    }
};

struct Fp16 : FloatInput {
    static const i32 VALUES = 8, WORDS = 4;
    static __device__ inline void unpack(const Product&, i32, i32, const u32* words, f32* values) {
#pragma unroll
        for (i32 i = 0; i < 8; ++i) values[i] = half_to_float((u16)(words[i / 2] >> 16 * (i % 2)));
    }
    static __device__ inline f32 finish(const Product&, i32, f32 sum) { return sum; }
};

// One float32 scale [N].
struct Int8Weight : FloatInput {
    static const i32 VALUES = 16, WORDS = 2;
    static __device__ inline void unpack(const Product&, i32, i32, const u32* words, f32* values) {
#pragma unroll
        for (i32 i = 0; i < 8; ++i) values[i] = small_float((words[i / 4] ^ 0x80808080u) >> 8 * (i % 4) & 0xff, 128);
    }
    static __device__ inline f32 finish(const Product& p, i32 o, f32 sum) { return sum * ((const f32*)p.scale)[o]; }
};

// float16 scales [N, K / block]; a block is a multiple of 8.
struct Int4Weight : FloatInput {
    static const i32 VALUES = 32, WORDS = 1;
    static __device__ inline void unpack(const Product& p, i32 o, i32 k, const u32* words, f32* values) {
        const f32 scale = half_to_float(((const u16*)p.scale)[(u64)o * (p.K / p.block) + k / p.block]);
#pragma unroll
        for (i32 i = 0; i < 8; ++i) values[i] = scale * small_float((words[0] ^ 0x88888888u) >> 4 * i & 0xf, 8);
    }
    static __device__ inline f32 finish(const Product&, i32, f32 sum) { return sum; }
};

// Static W8A8: x is INT8 with input_scale, weights have one float32 scale [N]. K is a multiple of 16.
struct Int8 {
    typedef i32 Element;
    static const bool DOT = true;
    static const i32 VALUES = 16, WORDS = 2;
    static __device__ inline void read(const Product& p, i32 m, i32 k, i32* values) {
        unpack(p, 0, 0, (const u32*)((const i8*)p.x + (u64)m * p.K + k), values);
    }
    static __device__ inline void unpack(const Product&, i32, i32, const u32* words, i32* values) {
#pragma unroll
        for (i32 i = 0; i < 8; ++i) values[i] = signed_byte(words[i / 4], i % 4);
    }
    static __device__ inline i32 dot(const Product& p, i32 m, i32 k, const u32* words, i32 sum) {
        const uint4 x = *(const uint4*)((const i8*)p.x + (u64)m * p.K + k);
        sum = __dp4a((i32)words[0], (i32)x.x, sum);
        sum = __dp4a((i32)words[1], (i32)x.y, sum);
        sum = __dp4a((i32)words[2], (i32)x.z, sum);
        return __dp4a((i32)words[3], (i32)x.w, sum);
    }
    static __device__ inline f32 finish(const Product& p, i32 o, i32 sum) {
        return (f32)sum * (p.input_scale * ((const f32*)p.scale)[o]);
    }
};

// Sends off the sum of output o in row m; `next` is the sum of output o + 1, which SWIGLU takes along.
template <typename Form>
__device__ inline void emit(const Product& p, i32 m, i32 o, typename Form::Element sum, typename Form::Element next) {
    const f32 value = Form::finish(p, o, sum) + p.bias[o];
    if (p.activation != SWIGLU)
        put(p, m, o, activated(value, p.activation));
    else if (o % 2 == 0)
        put(p, m, o / 2, silu(value) * (Form::finish(p, o + 1, next) + p.bias[o + 1]));
}

// One chunk of output o's weights times rows m.. of x.
template <typename Form, i32 ROWS>
__device__ inline void add_chunk(const Product& p, i32 o, i32 first_row, i32 chunk, const uint4& loaded,
                                 typename Form::Element (&sum)[ROWS]) {
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    if constexpr (Form::DOT) {
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r)
            sum[r] = Form::dot(p, min(first_row + r, p.M - 1), chunk * Form::VALUES, words, sum[r]);
    } else {
#pragma unroll
        for (i32 g = 0; g < Form::VALUES / 8; ++g) {
            const i32 k = chunk * Form::VALUES + 8 * g;
            if (k >= p.K) break;
            typename Form::Element w[8];
            Form::unpack(p, o, k, words + g * Form::WORDS, w);
#pragma unroll
            for (i32 r = 0; r < ROWS; ++r) {
                typename Form::Element v[8];
                Form::read(p, min(first_row + r, p.M - 1), k, v);
#pragma unroll
                for (i32 i = 0; i < 8; ++i) sum[r] = multiply_add(w[i], v[i], sum[r]);
            }
        }
    }
}

// Few rows, where reading the weights is what takes time: ROWS rows at once, `lanes` threads (a power of two, at most
// 32) on an output, each with every lanes-th chunk. Grid: ceil(N / (THREADS / lanes)) blocks times ceil(M / ROWS).
template <typename Form, i32 ROWS>
__device__ void stream(const Product& p) {
    constexpr i32 IN_FLIGHT = ROWS > 4 ? 2 : 4;  // loads of weights that a thread has on their way
    __shared__ typename Form::Element sums[THREADS + 1][ROWS];
    const i32 outputs = THREADS / p.lanes, blocks = (p.N + outputs - 1) / outputs;
    const i32 lane = threadIdx.x % p.lanes, first_output = blockIdx.x % blocks * outputs;
    const i32 o = min(first_output + threadIdx.x / p.lanes, p.N - 1), first_row = blockIdx.x / blocks * ROWS;
    const i32 chunks = (p.K + Form::VALUES - 1) / Form::VALUES;
    const uint4* const row = (const uint4*)p.weight + (u64)o * chunks;
    typename Form::Element sum[ROWS] = {};
    for (i32 first = lane; first < chunks; first += IN_FLIGHT * p.lanes) {
        uint4 loaded[IN_FLIGHT];
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; ++i)
            loaded[i] = first + i * p.lanes < chunks ? load_weights(row + first + i * p.lanes) : uint4{0, 0, 0, 0};
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; ++i)
            if (first + i * p.lanes < chunks)
                add_chunk<Form, ROWS>(p, o, first_row, first + i * p.lanes, loaded[i], sum);
    }
#pragma unroll 1
    for (i32 mask = p.lanes / 2; mask > 0; mask /= 2)
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], mask);
#pragma unroll
    for (i32 r = 0; r < ROWS; ++r)
        if (r % p.lanes == lane) sums[threadIdx.x / p.lanes][r] = sum[r];
    __syncthreads();
#pragma unroll 1
    for (i32 i = threadIdx.x; i < outputs * ROWS; i += THREADS) {
        const i32 output = first_output + i / ROWS, m = first_row + i % ROWS;
        if (output < p.N && m < p.M) emit<Form>(p, m, output, sums[i / ROWS][i % ROWS], sums[i / ROWS + 1][i % ROWS]);
    }
}

const i32 TILE = 64, TILE_K = 32, THREAD_ROWS = 8, THREAD_OUTPUTS = 4;

// Many rows: tiles of TILE rows and TILE outputs in shared memory; every sum runs along K in order.
// Grid: ceil(N / TILE) * ceil(M / TILE).
template <typename Form>
__device__ void tiled(const Product& p) {
    typedef typename Form::Element Element;
    __shared__ Element shared[2 * TILE_K][TILE + 1];  // x, then weights [K, line]; in the end sums [row, output]
    Element(*const rows)[TILE + 1] = shared, (*const weights)[TILE + 1] = shared + TILE_K;
    const i32 blocks = (p.N + TILE - 1) / TILE, words = (p.K + Form::VALUES - 1) / Form::VALUES * 4;
    const i32 first_output = blockIdx.x % blocks * TILE, first_row = blockIdx.x / blocks * TILE;
    const i32 across = threadIdx.x % (TILE / THREAD_OUTPUTS) * THREAD_OUTPUTS;
    const i32 down = threadIdx.x / (TILE / THREAD_OUTPUTS) * THREAD_ROWS;
    Element sum[THREAD_ROWS][THREAD_OUTPUTS] = {};
    for (i32 k = 0; k < p.K; k += TILE_K) {
        for (i32 i = threadIdx.x; i < TILE * TILE_K / 8; i += THREADS) {
            const i32 line = i % TILE, part = i / TILE * 8, m = first_row + line, o = first_output + line;
            Element x[8] = {}, w[8] = {};
            if (m < p.M && k + part < p.K) Form::read(p, m, k + part, x);
            if (o < p.N && k + part < p.K) {
                const u32* const from = (const u32*)p.weight + (u64)o * words + (k + part) / 8 * Form::WORDS;
                Form::unpack(p, o, k + part, from, w);
            }
#pragma unroll
            for (i32 j = 0; j < 8; ++j) rows[part + j][line] = x[j], weights[part + j][line] = w[j];
        }
        __syncthreads();
#pragma unroll 4
        for (i32 i = 0; i < TILE_K; ++i) {
            Element w[THREAD_OUTPUTS];
#pragma unroll
            for (i32 o = 0; o < THREAD_OUTPUTS; ++o) w[o] = weights[i][across + o];
#pragma unroll
            for (i32 m = 0; m < THREAD_ROWS; ++m)
#pragma unroll
                for (i32 o = 0; o < THREAD_OUTPUTS; ++o)
                    sum[m][o] = multiply_add(w[o], rows[i][down + m], sum[m][o]);
        }
        __syncthreads();
    }
#pragma unroll
    for (i32 m = 0; m < THREAD_ROWS; ++m)
#pragma unroll
        for (i32 o = 0; o < THREAD_OUTPUTS; ++o) shared[down + m][across + o] = sum[m][o];
    __syncthreads();
#pragma unroll 1
    for (i32 i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const i32 m = first_row + i / TILE, o = first_output + i % TILE;
        if (m < p.M && o < p.N) emit<Form>(p, m, o, shared[i / TILE][i % TILE], shared[i / TILE][i % TILE + 1]);
    }
}

// One block a multiprocessor is enough: with more, the compiler spills registers of the products of 16 rows.
#define BOUNDED __launch_bounds__(THREADS, 1)

extern "C" __global__ BOUNDED void stream_fp16_2(PRODUCT_PARAMETERS) { stream<Fp16, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_fp16_4(PRODUCT_PARAMETERS) { stream<Fp16, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_fp16_8(PRODUCT_PARAMETERS) { stream<Fp16, 8>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_fp16_16(PRODUCT_PARAMETERS) { stream<Fp16, 16>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_2(PRODUCT_PARAMETERS) { stream<Int8, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_4(PRODUCT_PARAMETERS) { stream<Int8, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_8(PRODUCT_PARAMETERS) { stream<Int8, 8>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_16(PRODUCT_PARAMETERS) { stream<Int8, 16>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_weight_2(PRODUCT_PARAMETERS) { stream<Int8Weight, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_weight_4(PRODUCT_PARAMETERS) { stream<Int8Weight, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_weight_8(PRODUCT_PARAMETERS) { stream<Int8Weight, 8>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int8_weight_16(PRODUCT_PARAMETERS) { stream<Int8Weight, 16>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int4_weight_2(PRODUCT_PARAMETERS) { stream<Int4Weight, 2>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int4_weight_4(PRODUCT_PARAMETERS) { stream<Int4Weight, 4>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int4_weight_8(PRODUCT_PARAMETERS) { stream<Int4Weight, 8>(PRODUCT); }
extern "C" __global__ BOUNDED void stream_int4_weight_16(PRODUCT_PARAMETERS) { stream<Int4Weight, 16>(PRODUCT); }
extern "C" __global__ BOUNDED void tiled_fp16(PRODUCT_PARAMETERS) { tiled<Fp16>(PRODUCT); }
extern "C" __global__ BOUNDED void tiled_int8(PRODUCT_PARAMETERS) { tiled<Int8>(PRODUCT); }
extern "C" __global__ BOUNDED void tiled_int8_weight(PRODUCT_PARAMETERS) { tiled<Int8Weight>(PRODUCT); }
extern "C" __global__ BOUNDED void tiled_int4_weight(PRODUCT_PARAMETERS) { tiled<Int4Weight>(PRODUCT); }

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

// out [M, D] from rows of x: of every skipped + kept rows the last `kept`. May be in place where none is skipped.
// Grid: a block per row of out.
extern "C" __global__ BOUNDED void layer_norm(const f32* x, const f32* weight, const f32* bias, void* out, i32 D,
                                              i32 kept, i32 skipped, f32 out_scale) {
    const i32 m = blockIdx.x;
    const f32* const row = x + ((u64)(m / kept) * (kept + skipped) + skipped + m % kept) * D;
    f32 sum = 0, squares = 0;
    for (i32 i = threadIdx.x; i < D; i += THREADS) sum += row[i];
    const f32 mean = across_block<added>(sum) / D;
    for (i32 i = threadIdx.x; i < D; i += THREADS) squares = fmaf(row[i] - mean, row[i] - mean, squares);
    const f32 root = sqrtf(across_block<added>(squares) / D + LAYER_NORM_EPS);
    for (i32 i = threadIdx.x; i < D; i += THREADS)
        store_activation(out, (u64)m * D + i, (row[i] - mean) / root * weight[i] + bias[i], out_scale);
}

// ---- attention ----

const i32 MAX_POSITIONS = 2048, MAX_HEAD_DIM = 256, KEY_LANES = 8;

// 16 bytes of keys or values as float32.
__device__ inline void read_chunk(const u16* from, f32* values) {
    const uint4 loaded = *(const uint4*)from;
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (i32 i = 0; i < 8; ++i) values[i] = half_to_float((u16)(words[i / 2] >> 16 * (i % 2)));
}

__device__ inline void read_chunk(const f32* from, f32* values) {
    const float4 loaded = *(const float4*)from;
    values[0] = loaded.x, values[1] = loaded.y, values[2] = loaded.z, values[3] = loaded.w;
}

// out [d] of one query, which is in shared memory and scaled, over `count` keys and values [d], `stride` elements
// apart. All threads of the block. d is a multiple of the elements in 16 bytes.
template <typename Element>
__device__ void attend(const f32* query, const Element* keys, const Element* values, u64 stride, i32 count, i32 d,
                       void* out, u64 out_at, f32 out_scale) {
    constexpr i32 VALUES = 16 / sizeof(Element);
    __shared__ f32 weights[MAX_POSITIONS];
    __shared__ f32 partial[THREADS * VALUES];
    const i32 chunks = d / VALUES, lane = threadIdx.x % KEY_LANES;
    f32 largest = -3.4028235e38f;
    for (i32 first = 0; first < count; first += THREADS / KEY_LANES) {
        const i32 position = first + threadIdx.x / KEY_LANES;
        const Element* const key = keys + min(position, count - 1) * stride;
        f32 score = 0;
        for (i32 chunk = lane; chunk < chunks; chunk += KEY_LANES) {
            f32 k[VALUES];
            read_chunk(key + chunk * VALUES, k);
#pragma unroll
            for (i32 i = 0; i < VALUES; ++i) score = fmaf(query[chunk * VALUES + i], k[i], score);
        }
        for (i32 mask = KEY_LANES / 2; mask > 0; mask /= 2) score += __shfl_xor_sync(ALL_LANES, score, mask);
        largest = fmaxf(largest, score);
        if (lane == 0 && position < count) weights[position] = score;
    }
    largest = across_block<larger>(largest);
    f32 sum = 0;
    for (i32 i = threadIdx.x; i < count; i += THREADS) sum += weights[i] = expf(weights[i] - largest);
    sum = across_block<added>(sum);
    const i32 groups = THREADS / chunks, chunk = threadIdx.x % chunks, own_group = threadIdx.x / chunks;
    if (own_group < groups) {
        f32 total[VALUES] = {};
        for (i32 position = own_group; position < count; position += groups) {
            f32 v[VALUES];
            read_chunk(values + position * stride + chunk * VALUES, v);
#pragma unroll
            for (i32 i = 0; i < VALUES; ++i) total[i] = fmaf(weights[position], v[i], total[i]);
        }
#pragma unroll
        for (i32 i = 0; i < VALUES; ++i) partial[own_group * d + chunk * VALUES + i] = total[i];
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
    attend(query, keys + cache, values + cache, d, position + 1, d, out, (u64)blockIdx.x * d, out_scale);
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
    attend(query, keys + row, values + row, d, m % T + 1, d, out, (u64)blockIdx.x * d, out_scale);
}

// The decoder's: each of an image's T positions attends to all. qkv [I*T, 3HD], out [I*T, H, d]. Grid: I*T*H blocks.
extern "C" __global__ BOUNDED void attend_image(const f32* qkv, void* out, i32 T, i32 H, i32 d, f32 out_scale) {
    __shared__ f32 query[MAX_HEAD_DIM];
    const i32 m = blockIdx.x / H, h = blockIdx.x % H;
    const u64 width = (u64)3 * H * d;
    const f32 scale = 1 / sqrtf((f32)d);
    for (i32 i = threadIdx.x; i < d; i += THREADS) query[i] = scale * qkv[m * width + h * d + i];
    __syncthreads();
    const f32* const keys = qkv + m / T * T * width + (H + h) * d;
    attend(query, keys, keys + H * d, width, T, d, out, (u64)blockIdx.x * d, out_scale);
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

// out [S, 2F]: sines, then cosines, of the ratio's angle at every frequency. Any grid.
extern "C" __global__ BOUNDED void ratio_features(const f32* mask_ratio, const f32* frequencies, f32* out, i32 S,
                                                  i32 F) {
    for (u64 i = first_item(); i < (u64)S * F; i += item_stride()) {
        const u64 s = i / F, f = i % F;
        const f32 turns = mask_ratio[s] * frequencies[f];
        out[s * 2 * F + f] = sinpif(2 * turns);
        out[s * 2 * F + F + f] = cospif(2 * turns);
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

// out [M, to]: rows of `from` values, filled up with zeros. Any grid.
extern "C" __global__ BOUNDED void pad_rows(const f32* x, f32* out, i32 M, i32 from, i32 to) {
    for (u64 i = first_item(); i < (u64)M * to; i += item_stride())
        out[i] = i % to < from ? x[i / to * from + i % to] : 0;
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
