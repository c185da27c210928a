// Names of types, and how a grid of any size shares items.

#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;  // also the bits of a float16
typedef int i32;
typedef unsigned int u32;  // also two float16, the first in the low half
typedef unsigned long long u64;
typedef float f32;

__device__ inline u64 first_item() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline u64 item_stride() { return (u64)gridDim.x * blockDim.x; }
