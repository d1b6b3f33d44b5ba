// The same by OpenVINO, of a file of its own format (rarefy export ... -o model.xml): with_openvino model.xml PICTURE...
#include <openvino/openvino.hpp>
#include "answer.hpp"

int main(int count, char** arguments) {
  return guarded(count, arguments, [&](const std::string& path) {
    ov::Core core;
    const auto model = core.read_model(path);
    if (!model->has_rt_info("rarefy")) throw std::runtime_error(path + ": does not say how it is fed; export it with rarefy as .xml");
    const Json about = Json::parse(model->get_rt_info<std::string>("rarefy"));
    auto compiled = core.compile_model(model, "CPU", ov::inference_num_threads(1),
                                       ov::hint::inference_precision(ov::element::f32));  // as rarefy compared it, not bf16
    auto request = compiled.create_infer_request();
    const Run run = [&](const void* data, size_t, const std::vector<int64_t>& shape) {
      const auto type = about.has("feed") ? ov::element::u8 : ov::element::f32;
      request.set_tensor(about["inputs"][0]["name"].text,
                         ov::Tensor(type, ov::Shape(shape.begin(), shape.end()), const_cast<void*>(data)));
      request.infer();
      const ov::Tensor found = request.get_tensor(about["answer"].text);
      return std::vector<float>(found.data<float>(), found.data<float>() + found.get_size());
    };
    for (int i = 2; i < count; ++i) show(arguments[i], about, run);
  });
}
