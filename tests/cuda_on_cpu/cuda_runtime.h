// A meaning for the CUDA that the kernels use, for a C++ compiler: to test what they compute where there is no GPU.
//
// The threads of a block are fibres of one thread of the processor. Each runs until its next barrier (a shuffle is a
// barrier of its warp); which of those that can go on does so next is drawn from a seed, so that a missing barrier
// gives another result under some seed. Blocks run one after the other, in a drawn order. Shared memory is an allocation of
// the size that the launch asks for, filled with NaN, so that the address sanitizer sees what leaves it. A barrier that
// some threads never reach, or that threads reach at different places, is an error of the launch.
//
// To see that tests notice, a barrier can be left out while they run (missing_file, missing_line), and mistakes that
// a test has put into the sources, with mistake(), can be made one at a time.

#pragma once

#include <math.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define FWP_DYNAMIC_SHARED(name) float4* const name = static_cast<float4*>(emulated::machine().shared)

struct alignas(16) float4 {
    float x, y, z, w;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

#if !defined(__x86_64__)
#error "fibres are switched in the assembly of x86-64"
#endif

// emulated_switch(&left, entered): keeps what a call must keep on the stack that is left, and goes on with another.
// A hundred times faster than swapcontext(), which asks the operating system to keep the signal mask.
asm(R"(
.pushsection .text
.type emulated_switch, @function
emulated_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.popsection
)");
extern "C" void emulated_switch(void** left, void* entered);

namespace emulated {

inline int mistake_made = 0;
inline int mistake(int which) { return mistake_made == which; }  // 1: make it

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Fibre {
    void* top = nullptr;  // of what is on its stack
    char* stack = nullptr;
    enum { ready, at_block_barrier, at_warp_barrier, finished } state = ready;
    int line = 0;            // of the barrier
    int parity = 0;          // which slots the next shuffle uses
    void* fake = nullptr;    // of the address sanitizer
};

struct Machine {
    std::mt19937_64 draw{0};
    void* shared = nullptr;
    dim3 thread, block, block_size, grid;
    std::vector<Fibre> fibres;
    std::vector<double> slots[2];
    std::function<void()> body;
    void* scheduler = nullptr;
    void* fake = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    int running = 0;
    std::string error;
    const char* missing_file = "";  // of a barrier that is left out
    int missing_line = 0;

    static void enter() {
        Machine& m = instance();
        m.arrived();
        m.body();
        m.fibres[m.running].state = Fibre::finished;
        m.leave(true);
    }

    static Machine& instance() {
        static Machine machine;
        return machine;
    }

    // From the scheduler to fibre i.
    void resume(int i) {
        running = i;
        thread = dim3(unsigned(i));
        Fibre& fibre = fibres[i];
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake, fibre.stack, kStack);
#endif
        emulated_switch(&scheduler, fibre.top);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    // From the running fibre to the scheduler.
    void leave(bool for_good = false) {
        Fibre& fibre = fibres[running];
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.fake, scheduler_stack, scheduler_stack_size);
#else
        (void)for_good;
#endif
        emulated_switch(&fibre.top, scheduler);
        arrived(fibre.fake);
    }

    void arrived([[maybe_unused]] void* from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(from, &scheduler_stack, &scheduler_stack_size);
#endif
    }

    void wait(decltype(Fibre::state) state, const char* file, int line) {
        if (line == missing_line && std::strstr(file, missing_file)) return;
        fibres[running].state = state;
        fibres[running].line = line;
        leave();
    }

    // Opens the barrier that fibres [begin, end) have all reached.
    bool open(decltype(Fibre::state) state, int begin, int end) {
        for (int i = begin; i < end; ++i) {
            if (fibres[i].state != state) return false;
            if (fibres[i].line != fibres[begin].line) {
                error = "threads are at different barriers, in lines " + std::to_string(fibres[begin].line) + " and " +
                        std::to_string(fibres[i].line);
                return false;
            }
        }
        for (int i = begin; i < end; ++i) fibres[i].state = Fibre::ready;
        return true;
    }

    bool run_block() {
        const int count = int(fibres.size());
        for (Fibre& fibre : fibres) {
            fibre.state = Fibre::ready, fibre.parity = 0, fibre.fake = nullptr;
            // Six registers, where to go on, and the place of a return address that is never used.
            void** top = reinterpret_cast<void**>(fibre.stack + kStack) - 8;
            std::fill_n(top, 8, nullptr);
            top[6] = reinterpret_cast<void*>(&Machine::enter);
            fibre.top = top;
        }
        const int warps = (count + kWarp - 1) / kWarp;
        std::vector<int> order, able;
        for (int warp = 0;;) {
            // A warp that can go on, often the same again, so that some get far ahead of others.
            able.clear();
            for (int w = 0; w < warps; ++w)
                if (!ready(w, count).empty()) able.push_back(w);
            if (able.empty()) {
                if (open(Fibre::at_block_barrier, 0, count)) continue;
                if (error.empty() && !finished())
                    error = "threads wait at a barrier that others have passed or never reach";
                return error.empty();
            }
            if (draw() % 4 == 0 || !std::binary_search(able.begin(), able.end(), warp))
                warp = able[draw() % able.size()];
            order = ready(warp, count);
            std::shuffle(order.begin(), order.end(), draw);
            for (int i : order) resume(i);
            open(Fibre::at_warp_barrier, warp * kWarp, std::min((warp + 1) * kWarp, count));
            if (!error.empty()) return false;
        }
    }

    std::vector<int> ready(int warp, int count) const {
        std::vector<int> found;
        for (int i = warp * kWarp; i < std::min((warp + 1) * kWarp, count); ++i)
            if (fibres[i].state == Fibre::ready) found.push_back(i);
        return found;
    }

    bool finished() const {
        return std::all_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.state == Fibre::finished; });
    }

    cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
        body = std::move(kernel);
        grid = config.gridDim, block_size = config.blockDim;
        const size_t threads = block_size.x;
        while (fibres.size() < threads) {
            fibres.emplace_back();
            fibres.back().stack = static_cast<char*>(
                mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        }
        for (size_t i = threads; i < fibres.size(); ++i) munmap(fibres[i].stack, kStack);
        fibres.resize(threads);
        for (auto& side : slots) side.assign(threads, 0.0);
        std::vector<unsigned> order(grid.x);
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), draw);
        for (unsigned index : order) {
            block = dim3(index);
            shared = ::operator new(std::max<size_t>(config.dynamicSmemBytes, 1), std::align_val_t(16));
            std::memset(shared, 0xff, config.dynamicSmemBytes);
            const bool good = run_block();
            ::operator delete(shared, std::align_val_t(16));
            if (!good) return cudaErrorLaunchFailure;
        }
        return cudaSuccess;
    }

    template <class T>
    T shuffle(T value, int partner, const char* file, int line) {
        static_assert(sizeof(T) <= sizeof(double));
        const int parity = fibres[running].parity;
        fibres[running].parity = 1 - parity;
        std::memcpy(&slots[parity][running], &value, sizeof(T));
        // Nobody can be two shuffles ahead of a lane that has not read yet: two sides are enough.
        wait(Fibre::at_warp_barrier, file, line);
        std::memcpy(&value, &slots[parity][running / kWarp * kWarp + partner], sizeof(T));
        return value;
    }

    int lane() const { return running % kWarp; }
};

inline Machine& machine() { return Machine::instance(); }

}  // namespace emulated

inline dim3 &threadIdx = emulated::machine().thread, &blockIdx = emulated::machine().block;
inline dim3 &blockDim = emulated::machine().block_size, &gridDim = emulated::machine().grid;

#define __syncthreads() emulated::machine().wait(emulated::Fibre::at_block_barrier, __FILE__, __LINE__)
#define __syncwarp() emulated::machine().wait(emulated::Fibre::at_warp_barrier, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
    emulated::machine().shuffle(value, emulated::machine().lane() ^ (distance), __FILE__, __LINE__)
#define __trap() std::abort()

inline int atomicMin(int* at, int value) {
    const int before = *at;
    *at = std::min(before, value);
    return before;
}

inline int atomicExch(int* at, int value) {
    const int before = *at;
    *at = value;
    return before;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    return emulated::machine().launch(*config, [=] { kernel(arguments...); });
}
