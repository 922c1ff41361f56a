import java.io.OutputStream;
import java.io.PrintStream;
import java.lang.reflect.Array;
import java.lang.reflect.Method;
import java.lang.reflect.Modifier;
import java.lang.reflect.ParameterizedType;
import java.lang.reflect.Type;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

/**
 * Calls a method with literals, converted to its own parameter types; prints {"ok": value} as a line of JSON. A method
 * that returns nothing is judged by its first argument: {"ok": null, "first": value}.
 */
public class JudgedCalls {
    private static final PrintStream OUT = System.out;

    static {
        System.setOut(new PrintStream(OutputStream.nullOutputStream()));
    }

    public static List<Object> list(Object... items) {
        return new ArrayList<>(Arrays.asList(items));
    }

    public static void call(Class<?> owner, String name, Object... arguments) throws Throwable {
        for (Method method : owner.getDeclaredMethods()) {
            if (!method.getName().equals(name) || method.getParameterCount() != arguments.length) continue;
            method.setAccessible(true);
            Object[] converted = new Object[arguments.length];
            for (int i = 0; i < arguments.length; i++) converted[i] = convert(arguments[i], method.getGenericParameterTypes()[i]);
            Object target = null;
            if (!Modifier.isStatic(method.getModifiers())) {
                var constructor = owner.getDeclaredConstructor();
                constructor.setAccessible(true);
                target = constructor.newInstance();
            }
            Object value;
            try {
                value = method.invoke(target, converted);
            } catch (java.lang.reflect.InvocationTargetException error) {
                throw error.getCause();
            }
            StringBuilder text = new StringBuilder("{\"dict\": [[\"ok\", ");
            write(value, text);
            if (method.getReturnType() == void.class && arguments.length > 0) {
                text.append("], [\"first\", ");
                write(converted[0], text);
            }
            OUT.println(text.append("]]}"));
            OUT.flush();
            return;
        }
        throw new NoSuchMethodException(name + " with " + arguments.length + " parameters");
    }

    private static Object convert(Object value, Type type) {
        if (type instanceof ParameterizedType generic) {
            Type item = generic.getActualTypeArguments()[0];
            List<Object> items = new ArrayList<>();
            for (Object each : (List<?>) value) items.add(convert(each, item));
            return items;
        }
        Class<?> kind = (Class<?>) type;
        if (kind.isArray()) {
            List<?> items = (List<?>) value;
            Object array = Array.newInstance(kind.getComponentType(), items.size());
            for (int i = 0; i < items.size(); i++) Array.set(array, i, convert(items.get(i), kind.getComponentType()));
            return array;
        }
        if (kind == int.class || kind == Integer.class) return ((Number) value).intValue();
        if (kind == long.class || kind == Long.class) return ((Number) value).longValue();
        if (kind == double.class || kind == Double.class) return ((Number) value).doubleValue();
        if (kind == float.class || kind == Float.class) return ((Number) value).floatValue();
        if (kind == short.class || kind == Short.class) return ((Number) value).shortValue();
        if (kind == byte.class || kind == Byte.class) return ((Number) value).byteValue();
        if (kind == char.class || kind == Character.class) return ((String) value).charAt(0);
        return value;
    }

    private static void write(Object value, StringBuilder text) {
        if (value == null || value instanceof Boolean || value instanceof Number) {
            text.append(value);
        } else if (value.getClass().isArray()) {
            List<Object> items = new ArrayList<>();
            for (int i = 0; i < Array.getLength(value); i++) items.add(Array.get(value, i));
            write(items, text);
        } else if (value instanceof Iterable<?> items) {
            text.append('[');
            String separator = "";
            for (Object item : items) {
                text.append(separator);
                write(item, text);
                separator = ", ";
            }
            text.append(']');
        } else if (value instanceof Map.Entry<?, ?> entry) {
            write(List.of(entry.getKey(), entry.getValue()), text);
        } else if (value instanceof Map<?, ?> map) {
            write(map.entrySet(), text);
        } else {
            text.append('"');
            for (char letter : value.toString().toCharArray()) {
                if (letter == '"' || letter == '\\' || letter < 32 || letter > 126) text.append(String.format("\\u%04x", (int) letter));
                else text.append(letter);
            }
            text.append('"');
        }
    }
}
