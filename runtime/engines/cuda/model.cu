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

#include "attention.cuh"
#include "norms.cuh"
#include "products.cuh"

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
