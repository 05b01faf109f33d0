package natsx

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

// What .ci/run shows of dropped setters holds for all of them.
func TestEverySetterIsAmongTheDropped(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("testdata/dropped/dropped.go")
	if err != nil {
		t.Fatal(err)
	}
	builder := reflect.TypeFor[RouteBuilder]()
	for i := range builder.NumMethod() {
		if name := builder.Method(i).Name; !strings.Contains(string(source), "\tr."+name+"(") {
			t.Errorf("testdata/dropped does not call %s", name)
		}
	}
}
