// What surrounds the TensorRT engines of one token: noise, embeddings, sampling (docs/model.md) and copies.
//
// Every kernel works on device memory alone and reads the token index from *n, so that a captured CUDA graph is launched
// again for every token. Floating-point arithmetic is float32 in the order of runtime/sampling.py; compile it with
// --fmad=false. Unless a kernel says otherwise, any one-dimensional grid and block will do.
//
// B images, R rows (conditional rows first; row r belongs to image r % B), N tokens, S head passes, K bits of a token,
// D hidden size, W head width, F prefix length, C classes, P patch size. Arrays are dense, their last axis contiguous.

#include "common.cuh"

// Sums over bits multiply by the bit instead of branching on it, so that their loads do not wait for one another.

// Rows of symbol_embedding, docs/model.md section 2: class c, and what stands in for a drawn token.
const i32 FIRST_CLASS_SYMBOL = 3;
const i32 TOKEN_SYMBOL_AFTER_CLASSES = 5;

const i32 MAX_BITS = 256;

// ---- noise: runtime/noise.py ----

const u32 KIND_BITS = 0, KIND_CONFIDENCE = 1, KIND_SHIFT = 16;

struct Words {
    u32 word[4];
};

__device__ inline Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u64 seed) {
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (i32 round = 0; round < 10; ++round) {
        const u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c1 = (u32)p1;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

__device__ inline f32 to_uniform(u32 word) { return (f32)(word >> 8) * 5.9604644775390625e-8f; }  // 2^-24

__device__ inline f32 gumbel(f32 u) { return -logf(fmaxf(-logf(fmaxf(u, 1e-20f)), 1e-20f)); }

// u_bits [N, S, B, K, 2] and u_confidence [N, S, B, K] of the images with these indices. An item is one Philox block.
extern "C" __global__ void fill_uniforms(u64 seed, const u32* image_index, f32* u_bits, f32* u_confidence, i32 N, i32 S,
                                         i32 B, i32 K) {
    const u32 bits_blocks = (2 * K + 3) / 4, blocks = bits_blocks + (K + 3) / 4;
    const u64 items = (u64)N * S * B * blocks;
    for (u64 i = first_item(); i < items; i += item_stride()) {
        const u64 row = i / blocks;  // (token * S + pass) * B + image
        const u32 image = image_index[row % B], head_pass = (u32)(row / B % S), token = (u32)(row / B / S);
        const bool of_bits = i % blocks < bits_blocks;
        const u32 block = (u32)(i % blocks) - (of_bits ? 0 : bits_blocks), kind = of_bits ? KIND_BITS : KIND_CONFIDENCE;
        const Words words = philox(image, token, head_pass | kind << KIND_SHIFT, block, seed);
        const u32 count = of_bits ? 2 * K : K;
        f32* const out = (of_bits ? u_bits : u_confidence) + row * count;
        for (u32 j = 0; j < 4; ++j)
            if (4 * block + j < count) out[4 * block + j] = to_uniform(words.word[j]);
    }
}

// ---- the trunk's input ----

// Describes the position before token *n, the one whose latent draws it: its row of symbol_embedding (symbols), of
// pos_embed (own) and of target_aware_pos_embed (targets), its place in the sequence (start), all [R]; and its row in a
// modulation chunk laid out [positions, U], where chunk = {positions, U} and class_slot [R] is below U.
extern "C" __global__ void place_token(const i32* n, const i32* classes, const i32* class_slot, const i32* chunk,
                                       const i32* orders, i32* symbols, i32* own, i32* targets, i32* start,
                                       i32* modulation_index, i32 R, i32 B, i32 N, i32 F, i32 C) {
    const i32 token = *n;
    for (u64 r = first_item(); r < R; r += item_stride()) {
        const i32* const order = orders + r % B * N;  // [B, N]: the grid index drawn at each step
        symbols[r] = token == 0 ? classes[r] + FIRST_CLASS_SYMBOL : C + TOKEN_SYMBOL_AFTER_CLASSES;
        own[r] = token == 0 ? F - 1 : F + order[token - 1];
        targets[r] = F + order[token];
        start[r] = F - 1 + token;
        modulation_index[r] = token % chunk[0] * chunk[1] + class_slot[r];
    }
}

// x [M, D]: the sum over the bits of a position, plus its rows of the three other tables. Position m has the bits of
// image m % B; it has none where bits is null (the prefix), or n is not null and *n is 0 (the prefix's end).
extern "C" __global__ void embed(const i32* symbols, const i32* own, const i32* targets, const u8* __restrict__ bits,
                                 const f32* __restrict__ symbol_embedding, const f32* __restrict__ bit_embedding,
                                 const f32* __restrict__ pos_embed, const f32* __restrict__ target_aware_pos_embed,
                                 f32* __restrict__ x, i32 M, i32 D, i32 K, i32 B, const i32* n) {
    const bool has_bits = bits && (!n || *n > 0);
    for (u64 i = first_item(); i < (u64)M * D; i += item_stride()) {
        const u64 m = i / D, d = i % D;
        f32 sum = 0;
        if (has_bits) {
            const u8* const bit = bits + m % B * K;
#pragma unroll 8
            for (i32 k = 0; k < K; ++k) sum += (f32)bit[k] * bit_embedding[(u64)k * D + d];
        }
        sum += symbol_embedding[(u64)symbols[m] * D + d];
        sum += pos_embed[(u64)own[m] * D + d];
        x[i] = sum + target_aware_pos_embed[(u64)targets[m] * D + d];
    }
}

// ---- the head's input ----

// x [R, W]: masked_embedding, plus row k of bit_embedding [2K, W] for every known bit, plus row K + k for every known
// one. Pass 0 knows nothing, whatever `known` still holds of the token before.
extern "C" __global__ void head_embed(const u8* __restrict__ known, const u8* __restrict__ bits,
                                      const f32* __restrict__ bit_embedding, const f32* __restrict__ masked_embedding,
                                      f32* __restrict__ x, i32 R, i32 B, i32 K, i32 W, i32 head_pass) {
    for (u64 i = first_item(); i < (u64)B * W; i += item_stride()) {
        const u64 b = i / W, w = i % W;
        f32 sum = masked_embedding[w];
        if (head_pass > 0) {
            const u8 *const is_known = known + b * K, *const bit = bits + b * K;
            const f32* const ones = bit_embedding + (u64)K * W;
#pragma unroll 8
            for (i32 k = 0; k < K; ++k) sum += (f32)is_known[k] * bit_embedding[(u64)k * W + w];
#pragma unroll 8
            for (i32 k = 0; k < K; ++k) sum += (f32)(is_known[k] & bit[k]) * ones[(u64)k * W + w];
        }
        for (u64 r = b; r < R; r += B) x[r * W + w] = sum;
    }
}

// ---- sampling: sample_token of runtime/sampling.py ----

// One head pass of token *n. logits [R, K, 2], R = 2B if guided, else B; the noise of fill_uniforms; guidance [N],
// temperature [S], remask_count [S]. Redraws the bits that are not known; then known [B, K] is what the next pass begins
// with, except that the last pass (nothing masked again) writes tokens [B, N, K] instead. known and bits are 0 or 1.
// Grid: one block per image. K is at most MAX_BITS.
extern "C" __global__ void sample_pass(const f32* logits, const f32* u_bits, const f32* u_confidence,
                                       const f32* guidance, const f32* temperature, const i32* remask_count, u8* known,
                                       u8* bits, u8* tokens, const i32* n, i32 head_pass, i32 S, i32 N, i32 B, i32 K,
                                       i32 guided) {
    __shared__ f32 confidence[MAX_BITS];
    const i32 b = blockIdx.x, token = *n, left = remask_count[head_pass];
    const f32 scale = guidance[token], t = temperature[head_pass];
    const u64 noise = (((u64)token * S + head_pass) * B + b) * K, image = (u64)b * K;
    const f32 *const conditional = logits + 2 * image, *const unconditional = conditional + (u64)2 * B * K;
    for (i32 k = threadIdx.x; k < K; k += blockDim.x) {
        f32 logit[2], noisy[2];
        for (i32 value = 0; value < 2; ++value) {
            const i32 i = 2 * k + value;
            logit[value] = conditional[i];
            if (guided) logit[value] = unconditional[i] + scale * (conditional[i] - unconditional[i]);
            noisy[value] = logit[value] + t * gumbel(u_bits[2 * noise + i]);
        }
        const bool is_known = head_pass > 0 && known[image + k];
        const bool bit = is_known ? bits[image + k] : noisy[1] > noisy[0];
        bits[image + k] = bit;
        if (left == 0) tokens[((u64)b * N + token) * K + k] = bit;
        const f32 sure = is_known ? __int_as_float(0x7f800000) : logit[bit];  // infinity, or the logit without its noise
        confidence[k] = sure + t * gumbel(u_confidence[noise + k]);
    }
    if (left == 0) return;
    __syncthreads();
    // above the left-th smallest confidence = at least `left` are smaller; ties at the cutoff stay masked
    for (i32 k = threadIdx.x; k < K; k += blockDim.x) {
        i32 smaller = 0;
        for (i32 j = 0; j < K; ++j) smaller += confidence[j] < confidence[k];
        known[image + k] = smaller >= left;
    }
}

extern "C" __global__ void advance(i32* n) {
    if (first_item() == 0) *n += 1;
}

// ---- copies of opaque rows: in units of 16 bytes where everything is aligned to them, else of 2 ----

__device__ inline bool aligned_to_16(const void* from, const void* to, i32 row_bytes) {
    return ((u64)from | (u64)to | (u64)row_bytes) % 16 == 0;
}

template <typename Unit>
__device__ void gather_units(const Unit* table, const i32* index, Unit* out, u64 pieces, u64 P, u64 M, u64 units) {
    for (u64 i = first_item(); i < pieces * M * units; i += item_stride()) {
        const u64 piece = i / units / M;
        const i32 row = index[i / units % M];
        if (row >= 0) out[i] = table[(piece * P + row) * units + i % units];
    }
}

// table [pieces, P, row_bytes], out [pieces, M, row_bytes]: row m of every piece of out becomes row index[m] of the
// table's piece, or stays as it is where index[m] is negative. row_bytes is even.
extern "C" __global__ void gather_rows(const void* table, const i32* index, void* out, i32 pieces, i32 P, i32 M,
                                       i32 row_bytes) {
    if (aligned_to_16(table, out, row_bytes))
        gather_units((const uint4*)table, index, (uint4*)out, pieces, P, M, row_bytes / 16);
    else
        gather_units((const u16*)table, index, (u16*)out, pieces, P, M, row_bytes / 2);
}

template <typename Unit>
__device__ void write_units(const Unit* kv, Unit* caches, u64 start, u64 row_offset, u64 L, u64 G, u64 H, u64 T, u64 R,
                            u64 S_max, u64 units) {
    for (u64 i = first_item(); i < L * 2 * G * H * T * units; i += item_stride()) {
        const u64 t = i / units % T, h = i / units / T % H, g = i / units / T / H % G, piece = i / units / T / H / G;
        caches[(((piece * R + row_offset + g) * H + h) * S_max + start + t) * units + i % units] = kv[i];
    }
}

// kv [L, 2, G, H, T, row_bytes] of G rows and T positions goes into caches [L, 2, R, H, S_max, row_bytes], to rows
// row_offset.. and positions *start... row_bytes (head dim times item size) is even.
extern "C" __global__ void write_kv(const void* kv, void* caches, const i32* start, i32 row_offset, i32 L, i32 G, i32 H,
                                    i32 T, i32 R, i32 S_max, i32 row_bytes) {
    if (aligned_to_16(kv, caches, row_bytes))
        write_units((const uint4*)kv, (uint4*)caches, *start, row_offset, L, G, H, T, R, S_max, row_bytes / 16);
    else
        write_units((const u16*)kv, (u16*)caches, *start, row_offset, L, G, H, T, R, S_max, row_bytes / 2);
}

// ---- the decoder's input ----

// tokens [B, N, K] by generation step -> cells [B, N*P*P, K/(P*P)] of the fine grid in raster order: to_fine_grid of
// runtime/sampling.py after undoing the order. The grid of tokens is square.
extern "C" __global__ void to_cells(const u8* tokens, const i32* orders, f32* cells, i32 B, i32 N, i32 K, i32 P) {
    const u64 side = (u64)sqrtf((f32)N), token_size = K / (P * P);
    for (u64 i = first_item(); i < (u64)B * N * K; i += item_stride()) {
        const u64 k = i % K, b = i / K / N, in_patch = k / token_size;
        const u64 position = (u64)orders[i / K];
        const u64 row = position / side * P + in_patch / P, column = position % side * P + in_patch % P;
        cells[((b * side * P + row) * side * P + column) * token_size + k % token_size] = tokens[i];
    }
}
