// Reads questions from its input, prints a line of numbers for each thing asked for: see test_event_plan.py.
#include "event/plan.h"

#include <iostream>
#include <string>

int main() {
  using namespace iirsnn::event;
  const auto number = [] {
    int64_t value = 0;
    std::cin >> value;
    return value;
  };
  const auto shape = [&] {
    Shape made{};
    std::cin >> made.channels >> made.height >> made.width;
    return made;
  };
  const auto pair = [&] {
    Pair made{};
    std::cin >> made.y >> made.x;
    return made;
  };
  std::string what;
  while (std::cin >> what) {
    if (what == "tasks") {
      Load load{};
      load.out = shape();
      std::cin >> load.images >> load.steps;
      load.precision = Precision(number());
      bool wide;
      std::cin >> load.rows >> load.threads >> wide;
      load.padded = iirsnn::round_up(load.out.channels, row_unit(load.precision));
      load.tile = tile_width(load.precision, load.padded, false, wide);
      for (const Strip& s : cut(load)) {
        std::cout << s.output << ' ' << s.outputs << ' ' << s.first << ' ' << s.last - s.first << ' ' << s.top << ' '
                  << s.bottom - s.top << '\n';
      }
    } else if (what == "carries") {
      const int64_t outputs = number(), groups = number(), channels = number(), taps = number(), most = number();
      std::vector<float> weights(outputs * channels * taps);
      for (float& weight : weights) std::cin >> weight;
      const Filters filters{weights.data(), outputs, groups, channels, taps};
      for (const int carry : carries(filters, 0, outputs, 0, channels * groups, most)) std::cout << carry << '\n';
    } else if (what == "taps") {
      const Shape in = shape();
      const Window window{pair(), pair(), pair(), pair(), pair()};
      const int64_t top = number(), bottom = number();
      const Shape out = output_shape(in, 1, window);
      for (const Tap& tap : taps(window, in, out.width, top, bottom, in.width, 1, 1)) {
        std::cout << tap.in << ' ' << tap.out << ' ' << tap.rows << ' ' << tap.columns << '\n';
      }
    } else {
      return 1;
    }
  }
}
