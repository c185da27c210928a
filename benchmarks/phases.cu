// Phases of a token that need one another, with nothing else in them. A block adds one to what its neighbour left in the
// phase before, so that a phase which does not wait for all of it is found out.

__device__ inline void phase_of(const volatile unsigned* before, volatile unsigned* after) {
    if (threadIdx.x == 0) after[blockIdx.x] = before[(blockIdx.x + 1) % gridDim.x] + 1;
}

extern "C" __global__ void phase(const unsigned* before, unsigned* after) { phase_of(before, after); }

// Launched while the phase before still runs: waits for it here. Without the attribute, and before SM 9.0, as above.
extern "C" __global__ void early_phase(const unsigned* before, unsigned* after) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    phase_of(before, after);
}

extern "C" __global__ void clear(unsigned* arrived) { *arrived = 0; }

// All phases in one launch, whose blocks must all be resident; `arrived` is 0 before.
extern "C" __global__ void phases(unsigned* even, unsigned* odd, unsigned* arrived, int count) {
    for (unsigned i = 0; i < count; ++i) {
        phase_of(i % 2 ? odd : even, i % 2 ? even : odd);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(arrived, 1u);
            while (*(volatile unsigned*)arrived < (i + 1) * gridDim.x) {
            }
            __threadfence();
        }
        __syncthreads();
    }
}
