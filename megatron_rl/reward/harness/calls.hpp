// Calls a function with literals, converted to its own parameter types, and prints {"ok": value} as one line of JSON.
namespace calls {

inline void print(bool value) { std::cout << (value ? "true" : "false"); }
inline void print(const std::string& text) {
    std::cout << '"' << std::hex << std::setfill('0');
    for (unsigned char byte : text) {
        if (byte == '"' || byte == '\\' || byte < 32) std::cout << "\\u" << std::setw(4) << int(byte);
        else std::cout << byte;
    }
    std::cout << '"' << std::dec;
}
inline void print(char value) { print(std::string(1, value)); }
inline void print(const char* text) { print(std::string(text)); }
template <class T> std::enable_if_t<std::is_arithmetic_v<T>> print(const T& value) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(value)) std::cout << "NaN";
        else if (std::isinf(value)) std::cout << (value < 0 ? "-Infinity" : "Infinity");
        else std::cout << std::setprecision(17) << value;
    } else std::cout << +value;
}
template <class A, class B> void print(const std::pair<A, B>& value);
template <class C> auto print(const C& items) -> std::enable_if_t<!std::is_arithmetic_v<C>, decltype(void(items.begin()))> {
    std::cout << '[';
    bool first = true;
    for (const auto& item : items) {
        if (!first) std::cout << ", ";
        first = false;
        if constexpr (std::is_same_v<C, std::vector<bool>>) print(bool(item));
        else print(item);
    }
    std::cout << ']';
}
template <class A, class B> void print(const std::pair<A, B>& value) {
    std::cout << '[';
    print(value.first);
    std::cout << ", ";
    print(value.second);
    std::cout << ']';
}

// What the function itself prints is not part of its answer: answers go to a copy of standard output.
struct Output {
    std::ostringstream text;
    std::streambuf* before = std::cout.rdbuf(text.rdbuf());
    ~Output() { std::cout.rdbuf(before); }
};

template <class F> void answer(F function) {
    auto silence = std::make_unique<Output>();
    auto value = function();
    silence.reset();
    std::cout << "{\"dict\": [[\"ok\", ";
    print(value);
    std::cout << "]]}" << std::endl;
}
template <class R, class... P> void call(R (*function)(P...), std::decay_t<P>... arguments) {
    answer([&] { return function(arguments...); });
}
template <class R, class C, class... P> void call(R (C::*method)(P...), std::decay_t<P>... arguments) {
    C object;
    answer([&] { return (object.*method)(arguments...); });
}
template <class R, class C, class... P> void call(R (C::*method)(P...) const, std::decay_t<P>... arguments) {
    C object;
    answer([&] { return (object.*method)(arguments...); });
}

}  // namespace calls
