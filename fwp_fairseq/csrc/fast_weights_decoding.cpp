// The decoding operators: schemas, and their implementation on the CPU.

#include "fast_weights_decoding.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "fast_weights_cpu.h"

namespace fwp {

// Who goes on from which memory, and where it is written; see Step.
Moves plan(const Step& p) {
    Moves moves;
    moves.row.resize(p.rows), moves.to.resize(p.rows);
    if (!p.new_places) {
        moves.begin.resize(p.rows + 1), moves.from.resize(p.rows);
        for (int64_t i = 0; i < p.rows; ++i) moves.begin[i] = moves.from[i] = moves.row[i] = moves.to[i] = i;
        moves.begin[p.rows] = p.rows;
        return moves;
    }
    // Rows of each place: their number, then where they begin among all rows.
    std::vector<int64_t> place(p.rows), end(p.slots + 1);
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t parent = p.order ? p.order[i] : i;
        TORCH_CHECK_INDEX(parent >= 0 && parent < p.parents, "order has ", parent, ", there are ", p.parents, " rows");
        place[i] = p.places ? p.places[parent] : parent;
        TORCH_CHECK_INDEX(place[i] >= 0 && place[i] < p.slots, "places has ", place[i], ", there are ", p.slots);
        ++end[place[i] + 1];
    }
    for (int64_t s = 0; s < p.slots; ++s) {
        if (end[s + 1]) moves.begin.push_back(end[s]), moves.from.push_back(s);
        end[s + 1] += end[s];
    }
    moves.begin.push_back(p.rows);
    // From the last row to the first, so that the first of a family comes last in it.
    std::vector<int64_t> next(end.begin(), end.end() - 1);
    for (int64_t i = p.rows - 1; i >= 0; --i) moves.row[next[place[i]]++] = i;
    int64_t free = 0;
    for (int64_t f = 0; f < moves.families(); ++f) {
        for (int64_t i = moves.begin[f]; i < moves.begin[f + 1]; ++i) {
            moves.to[i] = moves.from[f];
            if (i + 1 < moves.begin[f + 1]) {
                while (end[free + 1] > end[free]) ++free;
                moves.to[i] = free++;
            }
            p.new_places[moves.row[i]] = moves.to[i];
        }
    }
    return moves;
}

}  // namespace fwp

namespace {

using at::Tensor;
using std::optional;

// Starting threads takes some microseconds.
int64_t grain(int64_t cost) { return std::max<int64_t>(1, 100000 / std::max<int64_t>(1, cost)); }

std::tuple<Tensor, Tensor> step(
    const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write, const optional<Tensor>& erase,
    const optional<Tensor>& decay, const Tensor& state, const optional<Tensor>& normalizer,
    const optional<Tensor>& order, const optional<Tensor>& places, const optional<Tensor>& projection,
    std::string_view feature_map, int64_t nu, std::string_view key_normalization) {
    fwp::StepCall call(
        q, k, v, write, erase, decay, state, normalizer, order, places, projection, feature_map, nu,
        key_normalization);
    const fwp::Step& p = call.problem;
    const fwp::Moves moves = fwp::plan(p);
    at::parallel_for(
        0, moves.families() * p.heads, grain(p.features.dk * p.dv * p.rows / std::max<int64_t>(1, moves.families())),
        [&](int64_t begin, int64_t end) {
            state.scalar_type() == at::kDouble ? fwp::step<double>(p, moves, begin, end)
                                               : fwp::step<float>(p, moves, begin, end);
        });
    return {call.out, call.new_places};
}

Tensor read_memory(
    const Tensor& q, const Tensor& state, const optional<Tensor>& normalizer, const optional<Tensor>& projection,
    std::string_view feature_map, int64_t nu, std::string_view key_normalization) {
    fwp::ReadCall call(q, state, normalizer, projection, feature_map, nu, key_normalization);
    const fwp::Read& p = call.problem;
    at::parallel_for(
        0, p.memories * p.heads, grain(p.features.dk * p.dv * (p.rows / p.memories)),
        [&](int64_t begin, int64_t end) {
            state.scalar_type() == at::kDouble ? fwp::read<double>(p, begin, end) : fwp::read<float>(p, begin, end);
        });
    return call.out;
}

bool has_feature_map(std::string_view name) { return fwp::feature_map_of(name).has_value(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) {
    m.def(
        "step(Tensor q, Tensor k, Tensor v, Tensor? write, Tensor? erase, Tensor? decay, Tensor(a!) state, "
        "Tensor(b!)? normalizer, Tensor? order, Tensor? places, Tensor? projection, str feature_map, int nu, "
        "str key_normalization) -> (Tensor out, Tensor places)");
    m.def(
        "read(Tensor q, Tensor state, Tensor? normalizer, Tensor? projection, str feature_map, int nu, "
        "str key_normalization) -> Tensor");
    m.def("has_feature_map(str name) -> bool", &has_feature_map);
}

TORCH_LIBRARY_IMPL(fwp_fairseq, CPU, m) {
    m.impl("step", &step);
    m.impl("read", &read_memory);
}
