// The arguments of the decoding operators, checked and turned into what the kernels take, for any device.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <iterator>
#include <optional>
#include <string_view>
#include <vector>

#include "fast_weights_tensors.h"

namespace fwp {

inline std::optional<FeatureMap> feature_map_of(std::string_view name) {
    constexpr std::string_view names[] = {"none", "elu", "favor", "dpfp", "tanh"};  // in the order of the enumeration
    for (size_t i = 0; i < std::size(names); ++i)
        if (name == names[i]) return static_cast<FeatureMap>(i);
    return {};
}

inline Features features_of(
    std::string_view map, int64_t nu, std::string_view normalization, const std::optional<at::Tensor>& projection,
    int64_t d_key, int64_t dk, at::ScalarType type) {
    Features f;
    f.d_key = d_key, f.dk = dk, f.nu = nu;
    const auto found = feature_map_of(map);
    TORCH_CHECK_VALUE(found, "feature_map is ", map, ", allowed are none, elu, favor, dpfp, tanh");
    f.map = *found;
    int64_t size = d_key;
    if (f.map == FeatureMap::dpfp) {
        size = 2 * d_key * nu;
        TORCH_CHECK_VALUE(nu >= 1 && nu < 2 * d_key, "nu is ", nu, ", allowed is 1 to 2 * d_key - 1 = ", 2 * d_key - 1);
    } else if (f.map == FeatureMap::favor) {
        TORCH_CHECK_VALUE(projection && projection->dim() == 2 && projection->size(1) == d_key &&
                              projection->scalar_type() == type && projection->is_contiguous(),
                          "favor needs a projection (m, d_key), contiguous and in the type of the state");
        f.projection = projection->const_data_ptr(), size = 2 * projection->size(0);
    }
    TORCH_CHECK_VALUE(size == dk, "the state has ", dk, " rows, these keys have ", size, " features");
    if (normalization == "sum") {
        f.normalization = KeyNormalization::sum;
    } else if (normalization == "l2") {
        f.normalization = KeyNormalization::l2;
    } else {
        TORCH_CHECK_VALUE(
            normalization == "none", "key_normalization is ", normalization, ", allowed are sum, l2, none");
    }
    return f;
}

// A call of `step`: the problem, what it returns, and whatever copies the problem's pointers need.
struct StepCall {
    Step problem{};
    at::Tensor out, new_places;
    std::vector<at::Tensor> held;

    StepCall(
        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& write,
        const std::optional<at::Tensor>& erase, const std::optional<at::Tensor>& decay, const at::Tensor& state,
        const std::optional<at::Tensor>& normalizer, const std::optional<at::Tensor>& order,
        const std::optional<at::Tensor>& places, const std::optional<at::Tensor>& projection,
        std::string_view feature_map, int64_t nu, std::string_view key_normalization) {
        TORCH_CHECK_VALUE(
            q.dim() == 3 && v.dim() == 3 && q.sizes() == k.sizes() && v.sizes().slice(0, 2) == k.sizes().slice(0, 2),
            "q and k must be (n, H, d_key), v (n, H, Dv)");
        problem.rows = k.size(0), problem.heads = k.size(1), problem.dv = v.size(2);
        const auto type = state_type(v);
        TORCH_CHECK_VALUE(state.dim() == 4 && state.size(1) == problem.heads && state.size(3) == problem.dv &&
                              state.scalar_type() == type && state.is_contiguous(),
                          "state must be (places, H, Dk, Dv), contiguous and in the type of accumulation");
        problem.slots = state.size(0);
        problem.features =
            features_of(feature_map, nu, key_normalization, projection, k.size(2), state.size(2), type);
        problem.q = token_of(hold(q)), problem.k = token_of(hold(k)), problem.v = token_of(hold(v));
        const auto gate = [&](const std::optional<at::Tensor>& x, const char* name) -> Sequence {
            if (!x) return {};
            TORCH_CHECK_VALUE(x->sizes() == k.sizes().slice(0, 2), name, " is not of shape (n, H)");
            return token_of(*x);
        };
        problem.write = gate(write, "write"), problem.erase = gate(erase, "erase");
        problem.decay = gate(decay, "decay");
        problem.state = state.data_ptr();
        if (normalizer) {
            TORCH_CHECK_VALUE(
                normalizer->sizes() == at::IntArrayRef({problem.slots, problem.heads, problem.features.dk, 1}) &&
                    normalizer->scalar_type() == type && normalizer->is_contiguous(),
                "normalizer must be (places, H, Dk, 1), contiguous and in the type of the state");
            problem.normalizer = normalizer->data_ptr();
        }
        problem.parents = places ? places->numel() : problem.slots;
        problem.order = indices(order, "order");
        problem.places = indices(places, "places");
        const bool moves = order || places;
        TORCH_CHECK_VALUE(problem.rows <= problem.slots, problem.rows, " rows, but ", problem.slots, " memories");
        TORCH_CHECK_VALUE(!order || order->size(0) == problem.rows, "order must be (n)");
        TORCH_CHECK_VALUE(order || !places || places->size(0) == problem.rows, "places must be (n)");
        TORCH_CHECK_VALUE(moves || problem.rows == problem.slots, "without order and places each row has a memory");
        new_places = at::empty({moves ? problem.rows : 0}, k.options().dtype(at::kLong));
        if (moves) problem.new_places = new_places.data_ptr<int64_t>();
        out = at::empty(v.sizes(), v.options());
        problem.out = token_of(out);
    }

    const at::Tensor& hold(const at::Tensor& x) { return held.emplace_back(with_rows(x)); }

    const int64_t* indices(const std::optional<at::Tensor>& x, const char* name) {
        if (!x) return nullptr;
        TORCH_CHECK_VALUE(x->dim() == 1 && x->scalar_type() == at::kLong, name, " must be (n), of int64");
        return held.emplace_back(x->contiguous()).const_data_ptr<int64_t>();
    }
};

// A call of `read`.
struct ReadCall {
    Read problem{};
    at::Tensor out;
    std::vector<at::Tensor> held;

    ReadCall(
        const at::Tensor& q, const at::Tensor& state, const std::optional<at::Tensor>& normalizer,
        const std::optional<at::Tensor>& projection, std::string_view feature_map, int64_t nu,
        std::string_view key_normalization) {
        TORCH_CHECK_VALUE(q.dim() == 3 && state.dim() == 4 && state.size(1) == q.size(1),
                          "q must be (n, H, d_key), state (memories, H, Dk, Dv)");
        const auto type = state_type(q);
        TORCH_CHECK_VALUE(state.scalar_type() == type, "state must be in the type of accumulation");
        problem.rows = q.size(0), problem.heads = q.size(1), problem.memories = state.size(0);
        problem.dv = state.size(3);
        TORCH_CHECK_VALUE(problem.memories > 0 && problem.rows % problem.memories == 0, problem.rows,
                          " rows cannot share ", problem.memories, " memories evenly");
        problem.features =
            features_of(feature_map, nu, key_normalization, projection, q.size(2), state.size(2), type);
        problem.q = token_of(held.emplace_back(with_rows(q)));
        problem.state = held.emplace_back(state.contiguous()).const_data_ptr();
        if (normalizer) {
            TORCH_CHECK_VALUE(normalizer->numel() == state.numel() / problem.dv && normalizer->scalar_type() == type,
                              "normalizer must be (memories, H, Dk, 1), in the type of the state");
            problem.normalizer = held.emplace_back(normalizer->contiguous()).const_data_ptr();
        }
        out = at::empty({problem.rows, problem.heads, problem.dv}, q.options());
        problem.out = token_of(out);
    }
};

}  // namespace fwp
