// All layers of a decoder for one token, without Python between their operators: a program that is written once for a
// search, from the layers' parameters, and runs for every token.

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "fast_weights_cpu.h"
#include "fast_weights_decoding.h"
#include "team.h"

namespace fwp {
namespace {

using at::Tensor;
using std::optional;

const float* numbers(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* numbers(const optional<Tensor>& x) { return x ? numbers(*x) : nullptr; }

// With more of them products are bound by arithmetic, and the BLAS is quicker; _MOST_ROWS of modules/few_rows_linear.py.
constexpr int64_t kFewRows = 48;

// Rows of numbers that an operation reads and the next one writes: in memory of their own, which grows, or somebody's.
struct Rows {
    std::vector<float> storage;
    float* data = nullptr;
    int64_t width = 0;

    float* resize(int64_t rows, int64_t columns) {
        width = columns;
        if (int64_t(storage.size()) < rows * columns) storage.resize(rows * columns);
        return data = storage.data();
    }
};

// What steps write and nobody reads after them. A thread keeps it, since new memory costs more than what is written.
struct Scratch {
    Rows x, y, kept;
    std::vector<uint8_t> integers;
    std::vector<float> steps;
};

// What a step is given, and what operations leave for each other.
struct Run {
    Team& team;
    int64_t rows;
    Scratch& scratch;
    const bool* padding;                     // (rows), or null
    at::TensorList memories, normalizers, sources, histories;
    const Step& moving;                      // rows, slots, order and places
    const Moves& moves;
    std::vector<Tensor> left;                // histories for the next token
    Tensor weights;                          // (rows, 1, length) of the sources, if an operation gives them
    bool is_last = false;                    // whether the operation is the program's last
    Tensor out;                              // what it has made
    Rows &x = scratch.x, &y = scratch.y, &kept = scratch.kept;

    float* data() { return x.data; }
    // The next x, which `turn` makes of what is there.
    float* next(int64_t columns) {
        if (!is_last) return y.resize(rows, columns);
        out = at::empty({rows, columns}, at::kFloat);
        y.width = columns;
        return y.data = out.data_ptr<float>();
    }
    void turn() { std::swap(x, y); }
    // What x is in the end.
    const Tensor& result() {
        if (!out.defined() || out.const_data_ptr<float>() != x.data) {
            out = at::empty({rows, x.width}, at::kFloat);
            std::copy_n(x.data, out.numel(), out.data_ptr<float>());
        }
        return out;
    }
};

struct Operation {
    virtual ~Operation() = default;
    virtual void run(Run& r) const = 0;
};

struct Keep : Operation {
    void run(Run& r) const override {
        std::copy_n(r.data(), r.rows * r.x.width, r.kept.resize(r.rows, r.x.width));
    }
};

struct Add : Operation {
    void run(Run& r) const override {
        TORCH_CHECK(r.kept.width == r.x.width, "what was kept has ", r.kept.width, " columns, not ", r.x.width);
        float* x = r.data();
        const float* kept = r.kept.data;
        for (int64_t i = 0; i < r.rows * r.x.width; ++i) x[i] += kept[i];
    }
};

struct Normalize : Operation {
    Tensor weight, bias;
    float epsilon;

    Normalize(Tensor weight, Tensor bias, double epsilon) : weight(weight), bias(bias), epsilon(float(epsilon)) {}

    void run(Run& r) const override {
        TORCH_CHECK(weight.numel() == r.x.width, "a layer norm of ", weight.numel(), " gets ", r.x.width, " columns");
        const Norm norm{r.data(), numbers(weight), numbers(bias), r.data(), r.x.width, epsilon};
        r.team.share(r.rows, 2 * r.x.width, [&](int64_t begin, int64_t end) { layer_norm(norm, begin, end); });
    }
};

struct Activate : Operation {
    bool gelu;

    explicit Activate(bool gelu) : gelu(gelu) {}

    void run(Run& r) const override {
        float* x = r.data();
        r.team.share(r.rows * r.x.width, gelu ? 20 : 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                x[i] = gelu ? x[i] * 0.5f * (1 + std::erf(x[i] * float(M_SQRT1_2))) : x[i] < 0 ? 0 : x[i];
        });
    }
};

// One weight, as numbers or as integers, which then come with what belongs to them.
struct Weight {
    Tensor matrix;
    optional<Tensor> bias, offset, worth;
    int64_t outputs;
};

// Linear layers of the same inputs, whose outputs come to stand beside each other.
struct Multiply : Operation {
    std::vector<Weight> weights;
    int64_t inputs, outputs = 0;
    bool integers = false;

    Multiply(int64_t inputs, at::TensorList matrices, const c10::List<optional<Tensor>>& biases,
             const c10::List<optional<Tensor>>& offsets, const c10::List<optional<Tensor>>& worths)
        : inputs(inputs) {
        for (size_t i = 0; i < matrices.size(); ++i) {
            Weight w{matrices[i], biases.get(i), offsets.get(i), worths.get(i), 0};
            w.outputs = w.worth ? w.worth->numel() : w.matrix.size(0);
            integers |= w.worth.has_value();
            outputs += w.outputs;
            weights.push_back(std::move(w));
        }
    }

    void run(Run& r) const override {
        TORCH_CHECK(inputs == r.x.width, "linear layers of ", inputs, " inputs get ", r.x.width);
        float* y = r.next(outputs);
        const int64_t row_bytes = (inputs + 3) / 4 * 4;
        if (integers) {
            r.scratch.integers.resize(r.rows * row_bytes), r.scratch.steps.resize(r.rows);
            r.team.share(r.rows, 4 * inputs, [&](int64_t begin, int64_t end) {
                to_integers(r.data() + begin * inputs, end - begin, inputs,
                            r.scratch.integers.data() + begin * row_bytes, r.scratch.steps.data() + begin);
            });
        }
        if (!integers && r.rows > kFewRows) {
            multiply_by_blas(r, y);
            return r.turn();
        }
        // Rows are read once for all panels of a part: of integers, whose panels are small, for several.
        const int64_t together = integers ? 4 : 1;
        const auto parts_of = [&](const Weight& w) { return (panels_of(w) + together - 1) / together; };
        int64_t parts = 0;
        for (const Weight& w : weights) parts += parts_of(w);
        r.team.share(parts, together * kPanel * inputs * cost(r.rows), [&](int64_t begin, int64_t end) {
            int64_t column = 0;
            for (const Weight& w : weights) {
                const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, parts_of(w));
                if (from < to) multiply(r, w, y + column, from * together, std::min(to * together, panels_of(w)));
                begin -= parts_of(w), end -= parts_of(w), column += w.outputs;
            }
        });
        r.turn();
    }

  private:
    void multiply_by_blas(Run& r, float* y) const {
        const Tensor x = at::from_blob(r.data(), {r.rows, inputs}, at::kFloat);
        for (const Weight& w : weights) {
            Tensor to = at::from_blob(y, {r.rows, w.outputs}, {outputs, 1}, at::kFloat);
            w.bias ? at::addmm_out(to, *w.bias, x, w.matrix.t()) : at::mm_out(to, x, w.matrix.t());
            y += w.outputs;
        }
    }

    static int64_t panels_of(const Weight& w) { return (w.outputs + kPanel - 1) / kPanel; }

    // Reading a weight counts as one multiply-add at least.
    int64_t cost(int64_t rows) const { return integers ? 1 + rows / 8 : 4 + rows / 2; }

    // Panels [from, to) of kPanel outputs.
    void multiply(Run& r, const Weight& w, float* y, int64_t from, int64_t to) const {
        if (w.worth) {
            const IntegerLinear p{
                r.scratch.integers.data(), r.scratch.steps.data(), w.matrix.const_data_ptr<int8_t>(),
                w.offset->const_data_ptr<int32_t>(), numbers(w.worth), numbers(w.bias), y,
                r.rows, inputs, w.outputs, outputs,
            };
            integer_linear(p, from, to);
        } else {
            const Linear p{
                r.data(), w.matrix.const_data_ptr(), w.bias ? w.bias->const_data_ptr() : nullptr, y, r.rows, inputs,
                w.outputs, w.matrix.stride(0), outputs,
            };
            linear<float>(p, from * kPanel, std::min(to * kPanel, w.outputs));
        }
    }
};

// Of the first columns, of as many as the weights have together, each becomes a weighted sum of what it is and was: the
// short convolution. `histories` from `first` on has what the columns of each weight were for the tokens before.
struct Convolve : Operation {
    int64_t first, heads;
    std::vector<Tensor> weights;  // (tokens, heads * d) each, the last of them for the token itself
    bool hides_padding;           // which then counts as nothing, and is not kept

    void run(Run& r) const override {
        float* x = r.data();
        for (size_t part = 0; part < weights.size(); ++part) {
            const Tensor &weight = weights[part], &history = r.histories[first + part];
            const int64_t before = weight.size(0) - 1, width = weight.size(1), d = width / heads, columns = r.x.width;
            TORCH_CHECK_VALUE(
                history.dim() == 4 && history.size(1) == heads && history.size(2) == before && history.size(3) == d &&
                    history.is_contiguous() && history.scalar_type() == at::kFloat &&
                    (r.moving.order || history.size(0) == r.rows) && int64_t(part + 1) * width <= columns,
                "a history must be (rows, H, tokens before, D), contiguous and float32");
            Tensor left = at::empty({r.rows, heads, before, d}, history.options());
            const float* w = numbers(weight);
            float* to = left.data_ptr<float>();
            for (int64_t row = 0; row < r.rows; ++row) {
                const int64_t parent = r.moving.order ? r.moving.order[row] : row;
                TORCH_CHECK_INDEX(0 <= parent && parent < history.size(0), "order is out of range");
                const float* from = numbers(history) + parent * before * width;
                const bool hidden = hides_padding && r.padding && r.padding[row];
                float* now = x + row * columns + part * width;
                for (int64_t head = 0; head < heads; ++head, from += before * d, to += before * d, now += d)
                    for (int64_t i = 0; i < d; ++i) {
                        const float* own = w + head * d + i;
                        const float value = hidden ? 0 : now[i];
                        float sum = own[before * width] * value;
                        for (int64_t t = 0; t < before; ++t) sum += own[t * width] * from[t * d + i];
                        for (int64_t t = 0; t < before; ++t)
                            to[t * d + i] = hidden ? from[t * d + i] : t + 1 < before ? from[(t + 1) * d + i] : value;
                        now[i] = sum;
                    }
            }
            r.left[first + part] = left;
        }
    }
};

// Writes a token into the memories of a layer, and reads right after it. x: queries, keys, values, then the logits of
// the write strength and of the decay, of those that there are.
struct Remember : Operation {
    // Each of write, erase and decay is the sum of a number, one times beta and one times alpha, or is not there.
    struct Gate {
        bool there;
        float constant, beta, alpha;
    };

    int64_t layer, heads;
    Features features;
    optional<Tensor> projection;
    bool normalized, has_beta, has_alpha;
    float range;
    Gate gates[3];

    void run(Run& r) const override {
        const Tensor& memory = r.memories[layer];
        const int64_t d = features.d_key, width = heads * d, columns = 3 * width + heads * (has_beta + has_alpha);
        TORCH_CHECK(r.x.width == columns, "queries, keys, values and gates have ", r.x.width, " columns, not ", columns);
        TORCH_CHECK_VALUE(
            memory.sizes() == at::IntArrayRef({r.moving.slots, heads, features.dk, d}) && memory.is_contiguous() &&
                memory.scalar_type() == at::kFloat,
            "a memory must be (places, H, Dk, Dv), contiguous and float32");
        float* x = r.data();
        Step p = r.moving;
        p.heads = heads, p.dv = d, p.features = features;
        p.q = {x, Type::float32, columns, d}, p.k = {x + width, Type::float32, columns, d};
        p.v = {x + 2 * width, Type::float32, columns, d};
        p.out = {r.next(width), Type::float32, width, d};
        p.state = memory.data_ptr();
        if (normalized) {
            const Tensor& normalizer = r.normalizers[layer];
            TORCH_CHECK_VALUE(
                normalizer.numel() == r.moving.slots * heads * features.dk && normalizer.is_contiguous() &&
                    normalizer.scalar_type() == at::kFloat,
                "a normalizer must be (places, H, Dk, 1), contiguous and float32");
            p.normalizer = normalizer.data_ptr();
        }
        std::vector<float> values[3];
        Sequence* sequences[3] = {&p.write, &p.erase, &p.decay};
        for (int which = 0; which < 3; ++which) {
            // Padding writes nothing, erases nothing and forgets nothing.
            if (!gates[which].there && !(which == 0 && r.padding)) continue;
            values[which].resize(r.rows * heads);
            *sequences[which] = {values[which].data(), Type::float32, heads, 1};
        }
        const auto share = [](float logit) { return 1 / (1 + std::exp(-logit)); };
        for (int64_t row = 0; row < r.rows; ++row)
            for (int64_t head = 0; head < heads; ++head) {
                const float* logits = x + row * columns + 3 * width + head;
                const float beta = has_beta ? range * share(*logits) : 0;
                const float alpha = has_alpha ? share(logits[has_beta ? heads : 0]) : 0;
                for (int which = 0; which < 3; ++which) {
                    if (values[which].empty()) continue;
                    const Gate& gate = gates[which];
                    const float plain = gate.constant + gate.beta * beta + gate.alpha * alpha;
                    values[which][row * heads + head] = r.padding && r.padding[row] ? float(which == 2) : plain;
                }
            }
        const int64_t families = r.moves.families();
        r.team.share(families * heads, 3 * features.dk * d * r.rows / families, [&](int64_t begin, int64_t end) {
            step<float>(p, r.moves, begin, end);
        });
        r.turn();
    }
};

// Softmax attention to the source, whose keys, values and padding are in `sources` from `first` on.
struct LookAt : Operation {
    int64_t first, heads;
    bool gives_weights;

    void run(Run& r) const override {
        const Tensor &keys = r.sources[first], &values = r.sources[first + 1], &padding = r.sources[first + 2];
        const int64_t sentences = keys.size(0), length = keys.size(2), d = keys.size(3);
        TORCH_CHECK_VALUE(
            keys.dim() == 4 && keys.sizes() == values.sizes() && keys.size(1) == heads && heads * d == r.x.width &&
                keys.is_contiguous() && values.is_contiguous() && keys.scalar_type() == at::kFloat &&
                values.scalar_type() == at::kFloat && sentences > 0 && r.rows % sentences == 0,
            "keys and values must be (sentences, H, S, D), contiguous and float32");
        TORCH_CHECK_VALUE(
            padding.numel() == 0 || (padding.numel() == sentences * length && padding.scalar_type() == at::kBool &&
                                     padding.is_contiguous()),
            "padding must be (sentences, S), contiguous and bool");
        Attend p{r.data(), numbers(keys), numbers(values), padding.numel() ? padding.const_data_ptr<bool>() : nullptr,
                 r.next(r.x.width), nullptr, r.rows, sentences, heads, d, length};
        if (gives_weights) {
            r.weights = at::empty({r.rows, 1, length}, keys.options());
            p.average = r.weights.data_ptr<float>();
        }
        // The heads of a sentence have their average together.
        const int64_t together = gives_weights ? heads : 1;
        r.team.share(sentences * heads / together, together * (2 * length * d + 20 * length) * r.rows / sentences,
                     [&](int64_t begin, int64_t end) { attend(p, begin * together, end * together); });
        r.turn();
    }
};

// Reads a source that was written into memories, which are in `sources` at `first`, before their normalizer.
struct Recall : Operation {
    int64_t first, heads;
    Features features;
    optional<Tensor> projection;
    bool normalized;

    void run(Run& r) const override {
        const Tensor &memory = r.sources[first], &normalizer = r.sources[first + 1];
        const int64_t d = features.d_key, memories = memory.size(0);
        TORCH_CHECK_VALUE(
            memory.sizes() == at::IntArrayRef({memories, heads, features.dk, d}) && memory.is_contiguous() &&
                memory.scalar_type() == at::kFloat && heads * d == r.x.width && memories > 0 && r.rows % memories == 0,
            "memories must be (sentences, H, Dk, Dv), contiguous and float32");
        Read p{r.rows, memories, heads, d, features, {r.data(), Type::float32, heads * d, d}, {}, memory.data_ptr()};
        if (normalized) {
            TORCH_CHECK_VALUE(
                normalizer.numel() == memories * heads * features.dk && normalizer.is_contiguous() &&
                    normalizer.scalar_type() == at::kFloat,
                "a normalizer must be (sentences, H, Dk, 1), contiguous and float32");
            p.normalizer = normalizer.data_ptr();
        }
        p.out = {r.next(heads * d), Type::float32, heads * d, d};
        r.team.share(memories * heads, features.dk * d * r.rows / memories, [&](int64_t begin, int64_t end) {
            read<float>(p, begin, end);
        });
        r.turn();
    }
};

// A program of operations; see fwp_fairseq/ops/native.py.
struct DecoderStep : torch::CustomClassHolder {
    std::vector<std::unique_ptr<Operation>> operations;
    bool integers = false;
    int64_t size = 0;  // numbers of all weights

    void keep() { operations.push_back(std::make_unique<Keep>()); }
    void add() { operations.push_back(std::make_unique<Add>()); }

    void normalize(const Tensor& weight, const Tensor& bias, double epsilon) {
        operations.push_back(std::make_unique<Normalize>(weight.contiguous(), bias.contiguous(), epsilon));
    }

    void activate(const std::string& name) {
        TORCH_CHECK_VALUE(name == "relu" || name == "gelu", "activation is ", name, ", allowed are relu, gelu");
        operations.push_back(std::make_unique<Activate>(name == "gelu"));
    }

    void multiply(int64_t inputs, const std::vector<Tensor>& weights, const c10::List<optional<Tensor>>& biases,
                  const c10::List<optional<Tensor>>& offsets, const c10::List<optional<Tensor>>& worths) {
        auto made = std::make_unique<Multiply>(inputs, weights, biases, offsets, worths);
        integers |= made->integers, size += inputs * made->outputs;
        operations.push_back(std::move(made));
    }

    void convolve(int64_t first, int64_t heads, const std::vector<Tensor>& weights, bool hides_padding) {
        auto made = std::make_unique<Convolve>();
        made->first = first, made->heads = heads, made->weights = weights, made->hides_padding = hides_padding;
        operations.push_back(std::move(made));
    }

    void remember(int64_t layer, int64_t heads, int64_t d_key, int64_t d_dot, const std::string& map, int64_t nu,
                  const std::string& normalization, const optional<Tensor>& projection, bool normalized, bool has_beta,
                  bool has_alpha, double range, const std::vector<std::vector<double>>& gates) {
        auto made = std::make_unique<Remember>();
        made->layer = layer, made->heads = heads, made->projection = projection, made->normalized = normalized;
        made->features = features_of(map, nu, normalization, projection, d_key, d_dot, at::kFloat);
        made->has_beta = has_beta, made->has_alpha = has_alpha, made->range = float(range);
        for (int i = 0; i < 3; ++i) {
            const bool there = gates[i].size() == 3;
            made->gates[i] = {there, there ? float(gates[i][0]) : 1, there ? float(gates[i][1]) : 0,
                              there ? float(gates[i][2]) : 0};
        }
        operations.push_back(std::move(made));
    }

    void look_at(int64_t first, int64_t heads, bool gives_weights) {
        auto made = std::make_unique<LookAt>();
        made->first = first, made->heads = heads, made->gives_weights = gives_weights;
        operations.push_back(std::move(made));
    }

    void recall(int64_t first, int64_t heads, int64_t d_key, int64_t d_dot, const std::string& map, int64_t nu,
                const std::string& normalization, const optional<Tensor>& projection, bool normalized) {
        auto made = std::make_unique<Recall>();
        made->first = first, made->heads = heads, made->projection = projection, made->normalized = normalized;
        made->features = features_of(map, nu, normalization, projection, d_key, d_dot, at::kFloat);
        operations.push_back(std::move(made));
    }

    std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> run(
        const Tensor& x, const optional<Tensor>& padding, const std::vector<Tensor>& memories,
        const std::vector<Tensor>& normalizers, const optional<Tensor>& order, const optional<Tensor>& places,
        const std::vector<Tensor>& sources, const std::vector<Tensor>& histories) const {
        TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat, "x must be (rows, width), float32");
        const int64_t rows = x.size(0);
        TORCH_CHECK_VALUE(!padding || (padding->numel() == rows && padding->scalar_type() == at::kBool),
                          "padding must be (rows), bool");
        const Tensor input = x.contiguous(), from = order ? order->contiguous() : Tensor();
        const Tensor where = places ? places->contiguous() : Tensor(), hidden = padding ? padding->contiguous() : Tensor();
        Step moving{};
        moving.rows = rows, moving.slots = memories.empty() ? rows : memories[0].size(0);
        moving.parents = places ? places->numel() : moving.slots;
        const bool moves = order || places;
        TORCH_CHECK_VALUE(rows <= moving.slots && (moves || rows == moving.slots), rows, " rows, but ", moving.slots, " memories");
        TORCH_CHECK_VALUE(!order || (order->numel() == rows && order->scalar_type() == at::kLong), "order must be (rows), int64");
        TORCH_CHECK_VALUE(!places || ((order || places->numel() == rows) && places->scalar_type() == at::kLong),
                          "places must be (rows), int64");
        Tensor moved = at::empty({moves ? rows : 0}, x.options().dtype(at::kLong));
        moving.order = order ? from.const_data_ptr<int64_t>() : nullptr;
        moving.places = places ? where.const_data_ptr<int64_t>() : nullptr;
        if (moves) moving.new_places = moved.data_ptr<int64_t>();
        const Moves plan = fwp::plan(moving);
        Tensor out, weights;
        std::vector<Tensor> left;
        const auto lead = [&](Team& team) {
            thread_local Scratch scratch;
            Run r{team, rows, scratch, padding ? hidden.const_data_ptr<bool>() : nullptr, memories, normalizers,
                  sources, histories, moving, plan, std::vector<Tensor>(histories.size())};
            std::copy_n(numbers(input), input.numel(), r.x.resize(rows, input.size(1)));
            for (const auto& operation : operations) {
                r.is_last = operation == operations.back();
                operation->run(r);
            }
            out = r.result();
            weights = r.weights.defined() ? r.weights : at::empty({0}, x.options());
            left = std::move(r.left);
        };
        // The BLAS has threads of its own.
        if (rows > kFewRows && !integers)
            Team::run_apart(lead);
        else
            Pace::keep(rows * size, [&](bool together) { Team::run(together, lead); });
        return {out, weights, moved, left};
    }
};

}  // namespace
}  // namespace fwp

TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) {
    m.class_<fwp::DecoderStep>("DecoderStep")
        .def(torch::init<>())
        .def("keep", &fwp::DecoderStep::keep)
        .def("add", &fwp::DecoderStep::add)
        .def("normalize", &fwp::DecoderStep::normalize)
        .def("activate", &fwp::DecoderStep::activate)
        .def("multiply", &fwp::DecoderStep::multiply)
        .def("convolve", &fwp::DecoderStep::convolve)
        .def("remember", &fwp::DecoderStep::remember)
        .def("look_at", &fwp::DecoderStep::look_at)
        .def("recall", &fwp::DecoderStep::recall)
        .def("run", &fwp::DecoderStep::run);
}
