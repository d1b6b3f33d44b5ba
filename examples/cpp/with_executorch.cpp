// The same by ExecuTorch, of a file for phones and boards (rarefy export ... -o model.pte): with_executorch model.pte PICTURE...
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include "answer.hpp"

using executorch::aten::ScalarType;
using executorch::extension::Module;

template <typename T>
static T checked(executorch::runtime::Result<T> result, const std::string& what) {
  if (!result.ok()) throw std::runtime_error(what + " (ExecuTorch's error " + std::to_string(int(result.error())) + ")");
  return std::move(*result);
}

int main(int count, char** arguments) {
  return guarded(count, arguments, [&](const std::string& path) {
    Module module(path);
    if (module.load() != executorch::runtime::Error::Ok) throw std::runtime_error(path + ": ExecuTorch can't open it");
    const auto told = checked(module.get("rarefy"), path + ": does not say how it is fed; export it with rarefy");
    const Json about = Json::parse(std::string(told.toString()));
    const auto& outputs = about["outputs"].list;
    const auto is_answer = [&](const Json& one) { return one.text == about["answer"].text; };
    const size_t answer = std::find_if(outputs.begin(), outputs.end(), is_answer) - outputs.begin();
    const Run run = [&](const void* data, size_t bytes, const std::vector<int64_t>& shape) {
      const auto input = executorch::extension::make_tensor_ptr(
          {shape.begin(), shape.end()}, std::vector<uint8_t>((const uint8_t*)data, (const uint8_t*)data + bytes), {}, {},
          about.has("feed") ? ScalarType::Byte : ScalarType::Float);
      const auto found = checked(module.forward(input), path + ": ExecuTorch can't run it; export it with batch 1");
      const auto numbers = found.at(answer).toTensor();
      return std::vector<float>(numbers.const_data_ptr<float>(), numbers.const_data_ptr<float>() + numbers.numel());
    };
    for (int i = 2; i < count; ++i) show(arguments[i], about, run);
  });
}
