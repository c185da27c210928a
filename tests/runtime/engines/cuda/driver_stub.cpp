// A CUDA driver on the CPU, to be found as libcuda.so.1: what bar-edge calls of it through cuda-bindings, and no more.
//
// One GPU of SM 9.0 with 1 GiB. What is put into a stream is done at once, what is captured when its graph is launched.
// Kernels are those of the libraries that host.py makes, named in BAR_EDGE_STUB_KERNELS (colons between), if the loaded
// cubin has them too. Wrong use is answered as CUDA answers it, or sooner where CUDA tells at the next synchronization.
// A kernel that leaves an allocation, or uses a freed one, is a segmentation fault. On the clock of events a kernel and
// a copy on the device take a millisecond, everything else takes no time.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Result : int {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, SHARED_OBJECT_INIT_FAILED = 303, INVALID_HANDLE = 400,
    NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, STREAM_CAPTURE_UNSUPPORTED = 900, STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNMATCHED = 903, STREAM_CAPTURE_WRONG_THREAD = 908, COOPERATIVE_LAUNCH_TOO_LARGE = 720,
};

using Handle = void*;
using Address = unsigned long long;
using Work = std::function<Result()>;
using Kernel = void (*)(unsigned grid, unsigned block, void** arguments);

constexpr int COOPERATIVE = 2, PROGRAMMATIC = 6;  // attributes of a launch
constexpr unsigned SM = 90, MULTIPROCESSORS = 132, MOST_THREADS = 1024, THREAD_LOCAL = 1;
constexpr size_t MEMORY = size_t(1) << 30, ALIGNMENT = 256, PAGE = 4096;
constexpr unsigned char GARBAGE = 0xA5;  // what fresh memory holds, and what is behind it

uintptr_t last_handle = 0x1000;

// Handles are never given twice, so that one whose object was destroyed is known to be invalid.
Handle new_handle() { return reinterpret_cast<Handle>(last_handle += 0x10); }

template <typename T>
struct Objects {
    std::map<Handle, T> held;
    Result add(Handle* handle, T object) {
        held.emplace(*handle = new_handle(), std::move(object));
        return SUCCESS;
    }
    T* find(Handle handle) {
        const auto found = held.find(handle);
        return found == held.end() ? nullptr : &found->second;
    }
    Result destroy(Handle handle) { return held.erase(handle) ? SUCCESS : INVALID_HANDLE; }
};

struct Capture {
    std::vector<Work> work;
    std::thread::id thread = std::this_thread::get_id();
    bool valid = true;
};

struct Function {
    Handle module;
    Kernel kernel;
    std::string parameters;  // host.py's codes
};

struct Block {
    char *pages, *begin, *end;
    size_t size;
};

std::mutex mutex;
bool initialized = false;
std::vector<void*> libraries;
Handle primary = nullptr;  // the only context
unsigned retained = 0;
thread_local std::vector<Handle> contexts;
std::map<Address, Block> memory;
size_t free_bytes = MEMORY;
Objects<std::optional<Capture>> streams;
Objects<std::vector<Work>> graphs, executables;
Objects<std::optional<double>> events;  // when each was recorded
Objects<std::string> modules;           // their images
Objects<Function> functions;
double clock_ms = 0;

bool is_alive(Handle context) { return retained && context == primary; }

bool is_held(Address address, size_t size) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    const auto& [begin, block] = *--after;
    return address - begin < block.size && size <= block.size - (address - begin);
}

// The capture of a stream, if it is capturing; null for no stream. A default stream never is.
std::optional<Capture>* find_stream(Handle handle) {
    static std::optional<Capture> never;
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? &never : streams.find(handle);
}

// For what may not happen while this thread captures: it ends the capture, too.
Result refuse_in_capture() {
    Result result = SUCCESS;
    for (auto& [handle, capture] : streams.held)
        if (capture && capture->thread == std::this_thread::get_id())
            capture->valid = false, result = STREAM_CAPTURE_UNSUPPORTED;
    return result;
}

Result enqueue(Handle stream, Work work) {
    std::optional<Capture>* const capture = find_stream(stream);
    if (!capture) return INVALID_HANDLE;
    if (!*capture) return work();
    if (!(*capture)->valid) return STREAM_CAPTURE_INVALIDATED;
    (*capture)->work.push_back(std::move(work));
    return SUCCESS;
}

// -- device and context ----------------------------------------------------------------------------------------------

Result init(unsigned flags) {
    const char* paths = std::getenv("BAR_EDGE_STUB_KERNELS");
    std::istringstream all(paths && !initialized ? paths : "");
    for (std::string path; std::getline(all, path, ':');) {
        libraries.push_back(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
        if (!libraries.back()) return std::fprintf(stderr, "%s\n", dlerror()), SHARED_OBJECT_INIT_FAILED;
    }
    initialized = true;
    return flags ? INVALID_VALUE : SUCCESS;
}

Result driver_version(int* version) { return *version = 13000, SUCCESS; }

Result device_get(int* device, int ordinal) { return *device = 0, ordinal ? INVALID_DEVICE : SUCCESS; }

Result device_attribute(int* value, int attribute, int device) {
    const std::map<int, int> known = {{16, MULTIPROCESSORS}, {75, SM / 10}, {76, SM % 10}};
    if (device) return INVALID_DEVICE;
    if (!known.count(attribute)) return INVALID_VALUE;
    return *value = known.at(attribute), SUCCESS;
}

Result primary_retain(Handle* context, int device) {
    if (device) return INVALID_DEVICE;
    if (!retained++) primary = new_handle();
    return *context = primary, SUCCESS;
}

Result primary_release(int device) {
    if (device) return INVALID_DEVICE;
    return retained ? (--retained, SUCCESS) : INVALID_CONTEXT;
}

Result context_current(Handle* context) { return *context = contexts.empty() ? nullptr : contexts.back(), SUCCESS; }

Result context_push(Handle context) {
    if (!is_alive(context)) return INVALID_CONTEXT;
    return contexts.push_back(context), SUCCESS;
}

Result context_pop(Handle* context) {
    if (contexts.empty()) return INVALID_CONTEXT;
    *context = contexts.back();
    return contexts.pop_back(), SUCCESS;
}

Result context_set(Handle context) {
    if (context && !is_alive(context)) return INVALID_CONTEXT;
    if (!contexts.empty()) contexts.pop_back();
    if (context) contexts.push_back(context);
    return SUCCESS;
}

Result context_device(int* device) { return *device = 0, SUCCESS; }

// -- memory ----------------------------------------------------------------------------------------------------------

// At the end of its pages, with one behind it that nobody may touch; what lies between them is looked at by `release`.
Result allocate(Address* address, size_t size) {
    if (const Result refused = refuse_in_capture()) return refused;
    if (!size) return INVALID_VALUE;
    if (size > free_bytes) return OUT_OF_MEMORY;
    const size_t padded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, mapped = (padded + PAGE - 1) / PAGE * PAGE;
    void* const pages = mmap(nullptr, mapped + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return OUT_OF_MEMORY;
    char* const end = static_cast<char*>(pages) + mapped;
    mprotect(end, PAGE, PROT_NONE);
    const Block block{static_cast<char*>(pages), end - padded, end, size};
    std::memset(block.begin, GARBAGE, padded);
    memory[*address = reinterpret_cast<Address>(block.begin)] = block;
    return free_bytes -= size, SUCCESS;
}

// Its pages are never given again.
Result release(Address address) {
    if (const Result refused = refuse_in_capture()) return refused;
    const auto found = memory.find(address);
    if (found == memory.end()) return INVALID_VALUE;
    const Block block = found->second;
    bool overrun = false;
    for (char* byte = block.begin + block.size; byte < block.end; ++byte) overrun |= *byte != char(GARBAGE);
    madvise(block.pages, block.end - block.pages, MADV_DONTNEED);
    mprotect(block.pages, block.end - block.pages, PROT_NONE);
    memory.erase(found);
    return free_bytes += block.size, overrun ? ILLEGAL_ADDRESS : SUCCESS;
}

Result memory_info(size_t* free, size_t* total) { return *free = free_bytes, *total = MEMORY, SUCCESS; }

Result fill(Address target, unsigned char value, size_t size, Handle stream) {
    return enqueue(stream, [=] {
        if (!is_held(target, size)) return INVALID_VALUE;
        return std::memset(reinterpret_cast<void*>(target), value, size), SUCCESS;
    });
}

Result copy_inside(Address target, Address source, size_t size, Handle stream) {
    return enqueue(stream, [=] {
        if (!is_held(target, size) || !is_held(source, size)) return INVALID_VALUE;
        clock_ms += 1;
        return std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size), SUCCESS;
    });
}

// Nothing of the host's is captured: it may be gone when the graph runs.
Result copy(Address target, Address source, Address on_device, size_t size, Handle stream) {
    const std::optional<Capture>* const capture = find_stream(stream);
    if (!capture) return INVALID_HANDLE;
    if (*capture || !stream)
        if (const Result refused = refuse_in_capture()) return refused;
    if (!is_held(on_device, size)) return INVALID_VALUE;
    return std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size), SUCCESS;
}

Result upload(Address target, Address host, size_t size, Handle stream) {
    return copy(target, host, target, size, stream);
}

Result download(Address host, Address source, size_t size, Handle stream) {
    return copy(host, source, source, size, stream);
}

Result upload_and_wait(Address target, Address host, size_t size) { return upload(target, host, size, nullptr); }

Result download_and_wait(Address host, Address source, size_t size) { return download(host, source, size, nullptr); }

// -- streams, graphs, events -----------------------------------------------------------------------------------------

Result stream_create(Handle* stream, unsigned flags) { return flags > 1 ? INVALID_VALUE : streams.add(stream, {}); }

Result stream_destroy(Handle stream) { return streams.destroy(stream); }

Result stream_synchronize(Handle stream) {
    const std::optional<Capture>* const capture = find_stream(stream);
    if (!capture) return INVALID_HANDLE;
    return *capture ? refuse_in_capture() : SUCCESS;
}

Result begin_capture(Handle stream, int mode) {
    std::optional<Capture>* const capture = find_stream(stream);
    if (!capture) return INVALID_HANDLE;
    if (!streams.find(stream)) return STREAM_CAPTURE_UNSUPPORTED;
    if (*capture || mode != THREAD_LOCAL) return INVALID_VALUE;
    return capture->emplace(), SUCCESS;
}

Result end_capture(Handle stream, Handle* graph) {
    *graph = nullptr;
    std::optional<Capture>* const capture = find_stream(stream);
    if (!capture) return INVALID_HANDLE;
    if (!*capture) return STREAM_CAPTURE_UNMATCHED;
    if ((*capture)->thread != std::this_thread::get_id()) return STREAM_CAPTURE_WRONG_THREAD;
    const Capture ended = *std::exchange(*capture, std::nullopt);
    return ended.valid ? graphs.add(graph, ended.work) : STREAM_CAPTURE_INVALIDATED;
}

Result graph_instantiate(Handle* executable, Handle graph, unsigned long long flags) {
    const std::vector<Work>* const work = graphs.find(graph);
    return work && !flags ? executables.add(executable, *work) : INVALID_VALUE;
}

Result graph_launch(Handle executable, Handle stream) {
    const std::vector<Work>* const all = executables.find(executable);
    if (!all) return INVALID_VALUE;
    return enqueue(stream, [all = *all] {
        for (const Work& work : all)
            if (const Result failed = work()) return failed;
        return SUCCESS;
    });
}

Result graph_destroy(Handle graph) { return graphs.destroy(graph) ? INVALID_VALUE : SUCCESS; }

Result executable_destroy(Handle executable) { return executables.destroy(executable) ? INVALID_VALUE : SUCCESS; }

Result event_create(Handle* event, unsigned flags) { return flags ? INVALID_VALUE : events.add(event, {}); }

Result event_record(Handle event, Handle stream) {
    return enqueue(stream, [=] {
        std::optional<double>* const recorded = events.find(event);
        return recorded ? (*recorded = clock_ms, SUCCESS) : INVALID_HANDLE;
    });
}

Result event_synchronize(Handle event) { return events.find(event) ? SUCCESS : INVALID_HANDLE; }

Result event_elapsed(float* milliseconds, Handle begin, Handle end) {
    const std::optional<double>*const first = events.find(begin), *const last = events.find(end);
    if (!first || !last || !*first || !*last) return INVALID_HANDLE;
    return *milliseconds = float(**last - **first), SUCCESS;
}

Result event_destroy(Handle event) { return events.destroy(event); }

// -- kernels ---------------------------------------------------------------------------------------------------------

Result module_load(Handle* module, const void* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_machine != EM_CUDA) return INVALID_IMAGE;
    const unsigned sm[] = {header.e_flags & 0xff, header.e_flags >> 8 & 0xff};  // of CUDA 12, of CUDA 13
    if (sm[0] != SM && sm[1] != SM) return NO_BINARY_FOR_GPU;
    const size_t size = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
    return modules.add(module, std::string(static_cast<const char*>(image), size));
}

Result module_unload(Handle module) {
    std::erase_if(functions.held, [=](const auto& entry) { return entry.second.module == module; });
    return modules.destroy(module);
}

Result module_function(Handle* function, Handle module, const char* name) {
    const std::string* const image = modules.find(module);
    if (!image) return INVALID_HANDLE;
    if (image->find(std::string(".text.") + name + '\0') == std::string::npos) return NOT_FOUND;
    for (void* library : libraries) {
        void* const kernel = dlsym(library, (std::string("launch_") + name).c_str());
        void* const describe = dlsym(library, (std::string("parameters_") + name).c_str());
        if (!kernel || !describe) continue;
        const char* const parameters = reinterpret_cast<const char* (*)()>(describe)();
        return functions.add(function, {module, reinterpret_cast<Kernel>(kernel), parameters});
    }
    return NOT_FOUND;
}

// The arguments are copied before it returns. Those that are pointers must point into memory of the device.
Result launch(Handle handle, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
              unsigned block_z, unsigned shared_bytes, Handle stream, void** arguments, void** extra) {
    const Function* const function = functions.find(handle);
    if (!function) return INVALID_HANDLE;
    const bool flat = grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1 && !shared_bytes && !extra;
    if (!flat || !grid || grid > INT32_MAX || !block || block > MOST_THREADS || !arguments) return INVALID_VALUE;
    std::vector<uint64_t> values;
    std::vector<size_t> pointers;
    std::istringstream codes(function->parameters);
    for (std::string code; codes >> code; ++arguments) {
        if (code[0] == '*') pointers.push_back(values.size());
        values.push_back(0);
        std::memcpy(&values.back(), *arguments, code[0] == '*' ? sizeof(Address) : code[1] - '0');
    }
    return enqueue(stream, [=, kernel = function->kernel]() mutable {
        for (const size_t i : pointers)
            if (values[i] && !is_held(values[i], 1)) return ILLEGAL_ADDRESS;
        std::vector<void*> addresses;
        for (uint64_t& value : values) addresses.push_back(&value);
        clock_ms += 1;
        return kernel(grid, block, addresses.data()), SUCCESS;
    });
}

struct Attribute {  // CUlaunchAttribute
    int identity;
    int on[17];
};

struct Configuration {  // CUlaunchConfig
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    const Attribute* attributes;
    unsigned count;
};

// A programmatic launch waits for the one before it is begun. Blocks run in turn, so that all of a grid that wait for one
// another are too many.
Result launch_with(const Configuration* asked, Handle function, void** arguments, void** extra) {
    for (unsigned i = 0; i < asked->count; ++i) {
        const auto [identity, on] = asked->attributes[i];
        if ((identity != COOPERATIVE && identity != PROGRAMMATIC) || on[1] != 1) return INVALID_VALUE;
        if (identity == COOPERATIVE && asked->grid[0] > 1) return COOPERATIVE_LAUNCH_TOO_LARGE;
    }
    const auto [x, y, z] = asked->grid;
    const auto [block_x, block_y, block_z] = asked->block;
    return launch(function, x, y, z, block_x, block_y, block_z, asked->shared_bytes, asked->stream, arguments, extra);
}

// -- how it is found -------------------------------------------------------------------------------------------------

enum Needs { NOTHING, INITIALIZED, CONTEXT };

template <auto function, Needs needs>
struct Guarded;

template <typename... Arguments, Result (*function)(Arguments...), Needs needs>
struct Guarded<function, needs> {
    static Result call(Arguments... arguments) {
        const std::scoped_lock lock(mutex);
        if (needs != NOTHING && !initialized) return NOT_INITIALIZED;
        if (needs == CONTEXT && (contexts.empty() || !is_alive(contexts.back()))) return INVALID_CONTEXT;
        return function(arguments...);
    }
};

template <auto function, Needs needs = CONTEXT>
void* entry() {
    return reinterpret_cast<void*>(Guarded<function, needs>::call);
}

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status);

const std::map<std::string, void*> ENTRIES = {
    {"cuGetProcAddress", reinterpret_cast<void*>(cuGetProcAddress_v2)},
    {"cuInit", entry<init, NOTHING>()}, {"cuDriverGetVersion", entry<driver_version, NOTHING>()},
    {"cuDeviceGet", entry<device_get, INITIALIZED>()}, {"cuDeviceGetAttribute", entry<device_attribute, INITIALIZED>()},
    {"cuDevicePrimaryCtxRetain", entry<primary_retain, INITIALIZED>()},
    {"cuDevicePrimaryCtxRelease", entry<primary_release, INITIALIZED>()},
    {"cuCtxGetCurrent", entry<context_current, INITIALIZED>()},
    {"cuCtxPushCurrent", entry<context_push, INITIALIZED>()},
    {"cuCtxPopCurrent", entry<context_pop, INITIALIZED>()}, {"cuCtxSetCurrent", entry<context_set, INITIALIZED>()},
    {"cuCtxGetDevice", entry<context_device>()}, {"cuCtxSynchronize", entry<refuse_in_capture>()},
    {"cuMemAlloc", entry<allocate>()}, {"cuMemFree", entry<release>()}, {"cuMemGetInfo", entry<memory_info>()},
    {"cuMemsetD8Async", entry<fill>()}, {"cuMemcpyDtoDAsync", entry<copy_inside>()},
    {"cuMemcpyHtoD", entry<upload_and_wait>()}, {"cuMemcpyDtoH", entry<download_and_wait>()},
    {"cuMemcpyHtoDAsync", entry<upload>()}, {"cuMemcpyDtoHAsync", entry<download>()},
    {"cuStreamCreate", entry<stream_create>()}, {"cuStreamDestroy", entry<stream_destroy>()},
    {"cuStreamSynchronize", entry<stream_synchronize>()}, {"cuStreamBeginCapture", entry<begin_capture>()},
    {"cuStreamEndCapture", entry<end_capture>()}, {"cuGraphInstantiateWithFlags", entry<graph_instantiate>()},
    {"cuGraphLaunch", entry<graph_launch>()}, {"cuGraphDestroy", entry<graph_destroy>()},
    {"cuGraphExecDestroy", entry<executable_destroy>()}, {"cuEventCreate", entry<event_create>()},
    {"cuEventRecord", entry<event_record>()}, {"cuEventSynchronize", entry<event_synchronize>()},
    {"cuEventElapsedTime", entry<event_elapsed>()}, {"cuEventDestroy", entry<event_destroy>()},
    {"cuModuleLoadData", entry<module_load>()}, {"cuModuleUnload", entry<module_unload>()},
    {"cuModuleGetFunction", entry<module_function>()}, {"cuLaunchKernel", entry<launch>()},
    {"cuLaunchKernelEx", entry<launch_with>()},
};

}  // namespace

// The signature of each is that of before CUDA 13.0, which has other ones of some names besides.
extern "C" int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status) {
    const auto found = ENTRIES.find(name);
    const bool known = found != ENTRIES.end() && version < 13000;
    *function = known ? found->second : nullptr;
    if (status) *status = known ? 0 : 1;
    return known ? SUCCESS : NOT_FOUND;
}

// How much was made and not given back, as JSON.
extern "C" const char* stub_held() {
    static std::string told;
    const std::map<std::string, size_t> held = {
        {"contexts", retained}, {"memory", memory.size()}, {"streams", streams.held.size()},
        {"graphs", graphs.held.size() + executables.held.size()}, {"events", events.held.size()},
        {"modules", modules.held.size()},
    };
    told.clear();
    for (const auto& [kind, count] : held)
        told += (told.empty() ? "{\"" : ", \"") + kind + "\": " + std::to_string(count);
    return (told += "}").c_str();
}
